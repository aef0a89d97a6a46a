"""What ``import finitune`` offers, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import finitune


@pytest.mark.parametrize("name", finitune.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(finitune, name) is not None
    assert name in dir(finitune)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = finitune.nothing


def test_importing_it_loads_nothing_heavy() -> None:
    program = (
        "import sys, finitune; print([m for m in ('torch', 'numpy', 'pydantic', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
