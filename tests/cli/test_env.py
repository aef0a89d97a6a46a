"""``finitune env`` and ``finitune version``."""

from __future__ import annotations

import sys
from types import ModuleType

from finitune import __version__
from finitune.cli import version
from finitune.cli.env import cpu_flags


def test_version_tells_finitune_python_and_libraries(cli):
    found = cli("version", "--json").record["versions"]
    assert found["finitune"] == __version__
    assert set(version.LIBRARIES) <= set(found)
    assert cli("--version").out == cli("version").out


def test_a_library_that_is_absent_is_shown_as_absent(cli, monkeypatch):
    monkeypatch.setattr(version, "LIBRARIES", ("no-such-library",))
    assert cli("version", "--json").record["versions"]["no-such-library"] is None
    assert cli("version").code == 0


def test_env_tells_the_machine(cli):
    facts = cli("env", "--json").record["env"]
    assert facts["logical_cpus"] >= 1
    assert 0 < facts["memory_available_bytes"] <= facts["memory_total_bytes"]
    assert facts["torch_threads"] >= 1
    assert "cpu_capability" in cli("env").out


def test_env_survives_a_broken_torch(cli, monkeypatch):
    """A torch without its parts, as a half-removed installation leaves it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    ran = cli("env", "--json")
    assert ran.code == 0
    assert "ModuleNotFoundError" in ran.record["env"]["torch_error"]
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert "AttributeError" in cli("env", "--json").record["env"]["torch_error"]


def test_cpu_flags_are_read_where_linux_tells_them(tmp_path):
    source = tmp_path / "cpuinfo"
    source.write_text("model name: x\nflags\t\t: fpu avx2 amx_bf16 f16c\n")
    assert cpu_flags(source) == ["avx2", "amx_bf16", "f16c"]
    assert cpu_flags(tmp_path / "absent") == []
    source.write_bytes(b"\xff\xfe")
    assert cpu_flags(source) == []
