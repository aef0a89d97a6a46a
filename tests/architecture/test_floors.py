"""The house is law: who may import whom, and how long anything may be.

Every rule is a plain function from a source tree to a list of faults; the first half of the tests applies
the rules to FiniTune, the second half proves on made-up trees that each rule can fail.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import finitune

ROOT = Path(finitune.__file__).parent

# A floor imports from floors below it and from itself; rooms on the same floor do not know each other.
FLOORS = {
    "core": 0,
    "detectors": 1,
    "numerics": 1,
    "engine": 2,
    "data": 3,
    "models": 3,
    "train": 4,
    "adapters": 4,
    "preflight": 4,
    "postmortem": 4,
    "report": 5,
    "bench": 6,
    "cli": 7,
    "recipes": 0,
}
# What a room may import from outside, where that is restricted; the standard library is always allowed.
OUTSIDE = {
    "core": {"pydantic"},
    "detectors": set[str](),
    "numerics": {"torch", "numpy"},
    "engine": {"torch"},
}
MAX_FILE_LINES = 399
MAX_FUNCTION_LINES = 60
MAX_CONSTRUCTOR_LINES = 40


def sources(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported anywhere in a file, also inside functions.

    ``from a import b`` gives ``a.b``: b may be a module.
    """
    package = ("finitune", *path.parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def room_of(path: Path) -> str:
    """The package below finitune; "" for finitune's own ``__init__`` and ``__main__``."""
    return path.parts[0] if len(path.parts) > 1 else ""


def wrong_floors(root: Path) -> list[str]:
    faults = []
    for path, tree in sources(root):
        room = room_of(path)
        if room and room not in FLOORS:
            faults.append(f"{path}: {room} is on no floor")
            continue
        for line, name in imports(path, tree):
            parts = name.split(".")
            if not room or parts[0] != "finitune" or len(parts) < 2 or parts[1] not in FLOORS:
                continue
            if parts[1] != room and FLOORS[parts[1]] >= FLOORS[room]:
                faults.append(f"{path}:{line}: {room} (floor {FLOORS[room]}) imports {name}")
    return faults


def wrong_outside(root: Path) -> list[str]:
    faults = []
    for path, tree in sources(root):
        allowed = OUTSIDE.get(room_of(path))
        if allowed is None:
            continue
        for line, name in imports(path, tree):
            top = name.partition(".")[0]
            if top not in {"finitune", *allowed} and top not in sys.stdlib_module_names:
                faults.append(f"{path}:{line}: {room_of(path)} imports {name}")
    return faults


def imports_of_the_top(root: Path) -> list[str]:
    """Names taken from ``finitune`` itself would drag in whatever its lazy names need."""
    return [
        f"{path}:{line}: imports {name}"
        for path, tree in sources(root)
        if room_of(path)
        for line, name in imports(path, tree)
        if name == "finitune"
        or (name.startswith("finitune.") and name.split(".")[1] not in FLOORS and not name.endswith(".__version__"))
    ]


def filled_inits(root: Path) -> list[str]:
    return [
        str(path.relative_to(root))
        for path in sorted(root.rglob("__init__.py"))
        if path.parent != root and path.read_text(encoding="utf-8").strip()
    ]


def missing_inits(root: Path) -> list[str]:
    """A folder of modules without ``__init__`` is a namespace package, which tools treat unevenly."""
    folders = {p.parent for p in root.rglob("*.py")}
    return sorted(str(f.relative_to(root)) for f in folders if not (f / "__init__.py").exists())


def long_files(root: Path) -> list[str]:
    lengths = {p.relative_to(root): len(p.read_text(encoding="utf-8").splitlines()) for p in root.rglob("*.py")}
    return sorted(f"{p}: {n} lines" for p, n in lengths.items() if n > MAX_FILE_LINES)


def long_functions(root: Path) -> list[str]:
    faults = []
    for path, tree in sources(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                limit = MAX_CONSTRUCTOR_LINES if node.name == "__init__" else MAX_FUNCTION_LINES
                if lines > limit:
                    faults.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, more than {limit}")
    return faults


def foreign_characters(root: Path) -> list[str]:
    """Code and comments are ASCII; Chinese lives in string literals only."""
    strings = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    faults = []
    for path in sorted(root.rglob("*.py")):
        with tokenize.open(path) as handle:
            for token in tokenize.generate_tokens(handle.readline):
                if not token.string.isascii() and token.type not in strings:
                    faults.append(f"{path.relative_to(root)}:{token.start[0]}: {token.string}")
    return faults


RULES = [
    wrong_floors,
    wrong_outside,
    imports_of_the_top,
    filled_inits,
    missing_inits,
    long_files,
    long_functions,
    foreign_characters,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_stands(rule) -> None:
    faults = rule(ROOT)
    assert not faults, "\n".join(faults)


def test_the_rules_see_the_house() -> None:
    """An empty tree would pass everything."""
    seen = {room_of(path) for path, _ in sources(ROOT)}
    assert {"core", "detectors", "numerics", "engine", "data", "models", "train", "cli"} <= seen
    assert any(name.startswith("finitune.core") for path, tree in sources(ROOT) for _, name in imports(path, tree))


# ---- the meta-tests: every rule can fail ----


def house(root: Path, **files: str) -> Path:
    """A small sound tree with some files added."""
    for room in FLOORS:
        (root / room).mkdir()
        (root / room / "__init__.py").touch()
    (root / "__init__.py").touch()
    (root / "core" / "types.py").write_text('"""Ground."""\nimport json\nimport pydantic\n', encoding="utf-8")
    (root / "engine" / "step.py").write_text("import torch\nfrom finitune.core import types\n", encoding="utf-8")
    return put(root, **files)


def put(root: Path, **files: str) -> Path:
    """``room__module="text"`` becomes the file ``room/module.py``."""
    for name, text in files.items():
        (root / (name.replace("__", "/") + ".py")).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES)
def test_a_sound_house_has_no_faults(rule, tmp_path: Path) -> None:
    assert rule(house(tmp_path)) == []


@pytest.mark.parametrize(
    ("room", "statement"),
    [
        ("core", "import finitune.detectors.headroom"),
        ("core", "from finitune.engine.step import step"),
        ("core", "from finitune import engine"),
        ("core", "from ..engine import step"),
        ("core", "def f():\n    from finitune.train import loop"),
        ("core", "if True:\n    import finitune.cli.main"),
        ("detectors", "from finitune.numerics.norms import norms"),
        ("numerics", "from finitune.detectors import headroom"),
        ("engine", "from finitune.data.loader import Loader"),
        ("engine", "from finitune.models import load"),
        ("data", "from finitune.models.load import load"),
        ("models", "import finitune.data.collate as collate"),
        ("train", "from finitune.adapters import bare"),
        ("train", "from finitune.report import text"),
        ("report", "from finitune.cli.main import main"),
        ("bench", "from finitune.cli.main import main"),
    ],
)
def test_an_import_from_above_or_beside_is_seen(room: str, statement: str, tmp_path: Path) -> None:
    faults = wrong_floors(house(tmp_path, **{f"{room}__m": statement}))
    assert len(faults) == 1
    assert faults[0].startswith(f"{room}/m.py")


def test_a_room_on_no_floor_is_seen(tmp_path: Path) -> None:
    root = house(tmp_path)
    (root / "cellar").mkdir()
    (root / "cellar" / "__init__.py").touch()
    assert wrong_floors(root) == ["cellar/__init__.py: cellar is on no floor"]


@pytest.mark.parametrize(
    ("room", "statement"),
    [
        ("core", "import numpy"),
        ("core", "def f():\n    import torch"),
        ("detectors", "import torch.nn"),
        ("detectors", "from numpy import median"),
        ("engine", "import transformers"),
        ("engine", "import numpy as np"),
        ("numerics", "from peft import LoraConfig"),
    ],
)
def test_a_foreign_import_is_seen(room: str, statement: str, tmp_path: Path) -> None:
    assert len(wrong_outside(house(tmp_path, **{f"{room}__m": statement}))) == 1


@pytest.mark.parametrize("statement", ["import finitune", "from finitune import guard"])
def test_an_import_of_the_top_is_seen(statement: str, tmp_path: Path) -> None:
    assert len(imports_of_the_top(house(tmp_path, cli__m=statement))) == 1
    assert wrong_floors(tmp_path) == []


def test_a_filled_init_is_seen(tmp_path: Path) -> None:
    root = house(tmp_path)
    (root / "data" / "__init__.py").write_text("from finitune.data import loader\n", encoding="utf-8")
    assert filled_inits(root) == ["data/__init__.py"]


def test_a_filled_top_init_is_allowed(tmp_path: Path) -> None:
    root = house(tmp_path)
    (root / "__init__.py").write_text('__version__ = "1"\n', encoding="utf-8")
    assert filled_inits(root) == []


def test_a_missing_init_is_seen(tmp_path: Path) -> None:
    root = house(tmp_path)
    (root / "data" / "formats").mkdir()
    (root / "data" / "formats" / "m.py").touch()
    assert missing_inits(root) == ["data/formats"]


def test_a_long_file_is_seen(tmp_path: Path) -> None:
    assert long_files(house(tmp_path, data__m="a = 1\n" * MAX_FILE_LINES)) == []
    assert long_files(put(tmp_path, data__m="a = 1\n" * (MAX_FILE_LINES + 1))) == ["data/m.py: 400 lines"]


@pytest.mark.parametrize(("name", "limit"), [("f", MAX_FUNCTION_LINES), ("__init__", MAX_CONSTRUCTOR_LINES)])
@pytest.mark.parametrize("opening", ["def", "async def"])
def test_a_long_function_is_seen(name: str, limit: int, opening: str, tmp_path: Path) -> None:
    def body(lines: int) -> str:
        return f"class A:\n    {opening} {name}(self):\n" + "        a = 1\n" * (lines - 1)

    assert long_functions(house(tmp_path, data__m=body(limit))) == []
    assert len(long_functions(put(tmp_path, data__m=body(limit + 1)))) == 1


@pytest.mark.parametrize(
    ("text", "num_faults"),
    [
        ('A = "\u4e2d\u6587"\n', 0),
        ('A = (\n    "a"\n    "\u4e2d\u6587"\n)\n', 0),
        ("# \u4e2d\u6587\n", 1),
        ('\u4e2d = "a"\n', 1),
    ],
)
def test_a_foreign_character_outside_of_strings_is_seen(text: str, num_faults: int, tmp_path: Path) -> None:
    assert len(foreign_characters(house(tmp_path, data__m=text))) == num_faults
