"""The quickstart source: the docstrings of the interpreter's standard library, thousands of true sentences.

Source files are read and parsed (``ast``), never imported: importing ``this`` or ``antigravity`` has side
effects. Modules written in C have no source; the few that are already loaded by any interpreter are inspected.
The same interpreter gives the same rows in the same order.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import itertools
import math
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from finitune.core.types import RowId
from finitune.data.records import Row, canonical_bytes

# Not documentation for users of Python, or not part of every installation.
_SKIPPED = frozenset(
    (
        *("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"),
        *("ensurepip", "distutils", "pydoc_data", "encodings", "tkinter"),
    )
)
_SKIPPED_FILES = frozenset(("this.py", "antigravity.py", "turtle.py", "__main__.py"))
# All of these are compiled into CPython or loaded by this module's own imports.
_BUILT_IN: tuple[ModuleType, ...] = (builtins, itertools, math, time)
_MIN_CHARS = 40
# A first paragraph beyond this is a table or a manual, not an answer.
_MAX_CHARS = 480


def rows(source: str) -> Iterator[Row]:
    """Rows ``{"object": "collections.Counter", "kind": "class", "docstring": ...}``, numbered from 1."""
    number = 0
    for name, kind, doc in itertools.chain(_from_sources(), _from_built_in()):
        if len(doc) < _MIN_CHARS or len(doc.strip().partition("\n\n")[0]) > _MAX_CHARS:
            continue
        number += 1
        fields = {"object": name, "kind": kind, "docstring": doc}
        yield Row(RowId.of(source, number, canonical_bytes(fields)), fields)


def _source_files() -> Iterator[tuple[str, Path]]:
    """Public modules of the standard library by dotted name, sorted; skipped folders are never entered."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for here, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED and not f.startswith(("_", "config-")))
        package = Path(here).relative_to(root).parts
        for file in sorted(files):
            public = file == "__init__.py" or not file.startswith("_")
            if file.endswith(".py") and public and file not in _SKIPPED_FILES:
                stem = () if file == "__init__.py" else (file.removesuffix(".py"),)
                yield ".".join(package + stem), Path(here, file)


def _from_sources() -> Iterator[tuple[str, str, str]]:
    for name, path in _source_files():
        source = path.read_text("utf-8", errors="replace")
        if '"""' not in source:
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        doc = ast.get_docstring(tree)
        if doc:
            yield name, "module", doc
        yield from _definitions(tree.body, name)


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Public classes and functions with a docstring, methods included."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        doc = ast.get_docstring(node)
        if doc:
            yield name, "class" if isinstance(node, ast.ClassDef) else "function", doc
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, name)


def _from_built_in() -> Iterator[tuple[str, str, str]]:
    for module in _BUILT_IN:
        prefix = "" if module is builtins else f"{module.__name__}."
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not _is_compiled(value, module):
                continue
            kind = "class" if inspect.isclass(value) else "function"
            yield f"{prefix}{name}", kind, inspect.getdoc(value) or ""
            if inspect.isclass(value) and not issubclass(value, BaseException):
                yield from _methods(f"{prefix}{name}", value)


def _is_compiled(value: object, module: ModuleType) -> bool:
    """A function or class of the module's own; what a shell, a debugger or pytest has put there is not."""
    return getattr(value, "__module__", None) == module.__name__ and (
        inspect.isbuiltin(value) or inspect.isclass(value)
    )


def _methods(prefix: str, owner: type) -> Iterator[tuple[str, str, str]]:
    for name, value in sorted(vars(owner).items()):
        doc = getattr(value, "__doc__", None)
        if not name.startswith("_") and callable(value) and isinstance(doc, str):
            yield f"{prefix}.{name}", "function", inspect.cleandoc(doc)
