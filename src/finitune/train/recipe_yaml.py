"""Recipe text to plain values and back: YAML or JSON, with line numbers, and nothing executed.

Three habits of YAML 1.1 are mended: ``1e-4`` is a number, a key given twice is an error, and every
key remembers its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.train import codes

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
"""Numbers of YAML 1.2, which do not ask for a dot before the exponent."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


_LINE_BREAKS = frozenset("\r\x85\u2028\u2029")
"""YAML reads each of these as a line feed, unless it is escaped within double quotes."""


def _text_node(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = '"' if _LINE_BREAKS & set(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text_node)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A recipe as plain values; ``lines`` maps a dotted path to its 1-based line."""

    values: Any
    lines: Mapping[str, int] = field(default_factory=dict)
    duplicates: tuple[UserError, ...] = ()


def dump(values: Mapping[str, Any]) -> str:
    """YAML that :func:`parse` reads back to equal values, in the given order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse(content: str, source: str, *, is_json: bool = False) -> Parsed:
    """Values, lines and duplicate keys of a recipe.

    Raises:
        UserError: BROKEN_SYNTAX with line and column.
    """
    return _parse_json(content, source) if is_json else _parse_yaml(content, source)


def parse_value(content: str) -> Any:
    """The value of an override. Raises ValueError with the problem in words."""
    try:
        return yaml.load(content, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(_problem(error)) from error
    except RecursionError as error:
        raise ValueError(text("recipe.syntax.nested")) from error


def _parse_yaml(content: str, source: str) -> Parsed:
    loader = None
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        if node is None:
            return Parsed(None)
        lines: dict[str, int] = {}
        duplicates = tuple(_visit(node, "", lines, set(), source))
        return Parsed(loader.construct_document(node), lines, duplicates)
    except yaml.YAMLError as error:
        line, column = _place(error, content)
        raise _broken(content, source, line, column, _problem(error)) from error
    except RecursionError as error:
        raise _broken(content, source, 1, 1, text("recipe.syntax.nested")) from error
    except ValueError as error:  # such as the timestamp 2024-99-99, which YAML reads as a date
        raise _broken(content, source, 1, 1, str(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _visit(node: yaml.Node, prefix: str, lines: dict[str, int], seen: set[int], source: str) -> Iterator[UserError]:
    """Record the line of every key; yield the keys that stand twice. Each node is visited once (aliases)."""
    if id(node) in seen or not isinstance(node, yaml.MappingNode):
        return
    seen.add(id(node))
    here: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        path = prefix + name
        if name in here and name != "<<":
            where = text("recipe.line", source=source, line=line, path=path)
            yield UserError(codes.DUPLICATE_KEY, where, key=path, first=here[name], line=line)
        here[name] = line
        lines.setdefault(path, line)
        yield from _visit(value, f"{path}.", lines, seen, source)


def _parse_json(content: str, source: str) -> Parsed:
    twice: list[UserError] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        for name in {k for i, (k, _) in enumerate(items) if k in dict(items[:i])}:
            line = _json_lines(content, name)
            where = text("recipe.place", source=source, path=name)
            twice.append(UserError(codes.DUPLICATE_KEY, where, key=name, first=line[0], line=line[-1]))
        return dict(items)

    try:
        return Parsed(json.loads(content, object_pairs_hook=pairs), {}, tuple(twice))
    except json.JSONDecodeError as error:
        raise _broken(content, source, error.lineno, error.colno, error.msg) from error
    except RecursionError as error:
        raise _broken(content, source, 1, 1, text("recipe.syntax.nested")) from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise _broken(content, source, 1, 1, str(error)) from error


def _json_lines(content: str, name: str) -> list[int]:
    quoted = json.dumps(name)
    return [n for n, line in enumerate(content.splitlines(), 1) if quoted in line] or [1]


def _place(error: yaml.YAMLError, content: str) -> tuple[int, int]:
    """1-based line and column of a YAML error."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        if mark is not None:
            return mark.line + 1, mark.column + 1
    if isinstance(error, yaml.reader.ReaderError):
        before = content[: int(error.position)]
        return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
    return 1, 1


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        parts = (error.context, error.problem)
        return ", ".join(p for p in parts if p) or type(error).__name__
    return str(error).splitlines()[0]


def _broken(content: str, source: str, line: int, column: int, problem: str) -> UserError:
    rows = content.splitlines()
    excerpt = rows[line - 1].strip()[:100] if 0 < line <= len(rows) else text("recipe.syntax.end")
    return UserError(codes.BROKEN_SYNTAX, source, line=line, column=column, problem=problem, excerpt=excerpt)
