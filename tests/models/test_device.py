"""A device is tried before anything is loaded onto it."""

from __future__ import annotations

import pytest
import torch

from finitune.core.errors import UserError
from finitune.models.device import pick_device


def test_the_cpu_always_works_and_auto_finds_something() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps", "xpu", "npu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "meta-physical"])
def test_a_device_that_does_not_work_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match="MOD104") as caught:
        pick_device(name)
    assert caught.value.data["problem"]
