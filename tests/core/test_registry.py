"""Families: the file name is the registered name; listing imports nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from finitune.core import registry
from finitune.core.registry import FAMILIES, BrokenMember, Family, UnknownMember


@pytest.fixture
def animals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A family "animals" in a package of its own: cat (whole) and dog (lacks a name)."""
    package = tmp_path / "finitune_test_animals"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "cat": "def speak(): return 'miaow'\n",
        "dog": "",
        "_helper": "raise RuntimeError('imported')\n",
        "codes": "raise RuntimeError('imported')\n",
    }.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "FAMILIES", {"animals": Family(package.name, ("speak",))})
    registry.names.cache_clear()
    registry.load.cache_clear()
    yield package
    registry.names.cache_clear()
    registry.load.cache_clear()
    for name in [m for m in sys.modules if m.startswith(package.name)]:
        del sys.modules[name]


@pytest.mark.usefixtures("animals")
def test_members_are_the_files_without_private_ones_and_codes() -> None:
    assert registry.names("animals") == ("cat", "dog")


@pytest.mark.usefixtures("animals")
def test_listing_imports_no_member() -> None:
    registry.names("animals")
    assert "finitune_test_animals.cat" not in sys.modules


@pytest.mark.usefixtures("animals")
def test_a_whole_member_is_loaded() -> None:
    assert registry.load("animals", "cat").speak() == "miaow"


@pytest.mark.usefixtures("animals")
def test_a_member_that_lacks_a_name_is_broken() -> None:
    with pytest.raises(BrokenMember, match="'dog' lacks speak"):
        registry.load("animals", "dog")


@pytest.mark.usefixtures("animals")
def test_an_unknown_member_gets_suggestions() -> None:
    with pytest.raises(UnknownMember, match="did you mean cat") as caught:
        registry.load("animals", "cats")
    assert caught.value.suggestions == ("cat",)
    assert caught.value.known == ("cat", "dog")


@pytest.mark.parametrize("name", ["_helper", "codes", "..core.types", "", "cat.speak"])
@pytest.mark.usefixtures("animals")
def test_nothing_but_members_can_be_loaded(name: str) -> None:
    with pytest.raises(UnknownMember):
        registry.load("animals", name)


def test_third_parties_add_members_by_entry_points(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (animals.parent / "finitune_test_zoo.py").write_text("def speak(): return 'roar'\n", encoding="utf-8")
    groups = {"finitune.animals": (EntryPoint("lion", "finitune_test_zoo", "finitune.animals"),)}
    monkeypatch.setattr(registry, "entry_points", lambda group: groups.get(group, ()))
    assert registry.names("animals") == ("cat", "dog", "lion")
    assert registry.load("animals", "lion").speak() == "roar"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_member_of_every_family_is_whole(family: str) -> None:
    for name in registry.names(family):
        module = registry.load(family, name)
        assert all(hasattr(module, n) for n in FAMILIES[family].required)


def test_the_detectors_are_all_there() -> None:
    assert set(registry.names("detectors")) >= {
        "divergence",
        "gradient_explosion",
        "headroom",
        "loss_spike",
        "non_finite",
        "nothing_to_train",
        "scaler_collapse",
        "stalled_update",
    }


def test_listing_every_family_loads_no_torch() -> None:
    program = (
        "import sys; from finitune.core import registry; "
        "[registry.names(f) for f in registry.FAMILIES]; "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
