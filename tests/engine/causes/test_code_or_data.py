"""What the code makes of ordinary numbers is not put down to the data, nor to the range of a format."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.causes.scenes import DOWN, FP16, FP32, ROW, at, bad_before, case, evidence, row_found
from finitune.core.incident import Suspect, Trigger
from finitune.engine.case import Case
from finitune.engine.diagnose import diagnose

ATTENTION = "model.layers.3.self_attn"
KERNEL = "_FusedLinearBackward"


def named(of: Case) -> list[str]:
    return [c.name for c in diagnose(of).causes if c.named]


def backward(module: str, op: str = KERNEL, **data: Any) -> tuple[Suspect, ...]:
    return at(module, op, "backward", nan=True, input_amax=0.2, **data)


@pytest.mark.parametrize(
    ("module", "op", "cause"),
    [
        (f"{ATTENTION}.q_proj", KERNEL, "model_math"),
        (DOWN, "MmBackward0", "model_math"),
        (ATTENTION, "ScaledDotProductFlashAttentionForCpuBackward0", "attention_kernel"),
        ("(loss)", KERNEL, "loss_math"),
    ],
)
def test_a_backward_that_makes_nan_of_clean_numbers_is_code_on_one_row_as_on_all(
    module: str, op: str, cause: str
) -> None:
    one_row = evidence("known_good_batch rows scan_state", "fp32", rows=row_found())
    for found in (one_row, evidence("scan_state", "fp32 known_good_batch rows", known_good_batch={"num_good": 0})):
        of = case(Trigger.GRADIENT, facts=FP32, suspects=backward(module, op), evidence=found)
        assert named(of)[0] == cause
        assert "bad_row" not in named(of)


@pytest.mark.parametrize(
    "data", [{"input_amax": 1e25}, {"input_finite": False}, {"dtype": "float16", "value": 7e4}, {"input_amax": None}]
)
def test_large_numbers_a_bad_input_and_the_range_of_half_are_no_fault_of_the_backward(data: dict[str, Any]) -> None:
    suspects = at(DOWN, "MmBackward0", "backward", **{"nan": True, "input_amax": 0.2, **data})
    found = evidence("known_good_batch rows scan_state", "fp32", rows=row_found())
    assert "model_math" not in named(case(Trigger.GRADIENT, facts=FP32, suspects=suspects, evidence=found))


def test_an_overflow_that_a_smaller_scale_cures_is_none_either() -> None:
    suspects = at(DOWN, "MulBackward0", "backward", nan=False, input_amax=3.0, dtype="float32")
    of = case(Trigger.SCALE, facts=FP16, suspects=suspects, evidence=evidence("loss_scales scan_state"))
    assert "model_math" not in named(of)


def test_a_pole_in_a_module_that_one_row_meets_is_the_formula() -> None:
    found = evidence("known_good_batch rows scan_state", "fp32", rows=row_found())
    suspects = at("model.norm", "aten.div.Tensor", input_amax=1.5, nan=True)
    assert named(case(suspects=suspects, evidence=found))[0] == "model_math"
    huge = at("model.norm", "aten.pow.Tensor_Scalar", input_amax=1e22, nan=False)
    assert named(case(suspects=huge, evidence=found))[0] == "bad_row"


def test_an_embedding_of_patches_is_no_vocabulary() -> None:
    found = evidence("known_good_batch rows scan_state", "fp32", rows=row_found())
    for table in (False, True):
        suspects = at("vision.patch_embed", "aten._to_copy.default", table=table, amax=math.inf)
        assert ("vocabulary" in named(case(facts=FP16, suspects=suspects, evidence=found))) is table


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ({"since_exact": False, "sound_at": 12}, "corrupt_state"),
        ({"since_exact": False, "sound_at": 0, "frozen": True}, "corrupt_state"),
        ({"since_exact": True, "sound_at": None}, "bad_weights"),
        ({"since_exact": False, "sound_at": None}, None),
    ],
)
def test_bad_from_the_start_is_only_what_is_not_known_to_have_been_sound(
    data: dict[str, Any], cause: str | None
) -> None:
    bad = bad_before("parameter", "w", None, **data)
    of = case(facts=FP32, suspects=(bad,), evidence=evidence("", "scan_state fp32"))
    assert named(of)[:1] == ([cause] if cause else [])


def test_a_division_by_no_target_in_one_micro_batch_is_no_pole_of_the_loss() -> None:
    told = {"supervised": 40, "tokens": 64, "empty_micros": [1], "empty_rows": [ROW]}
    found = evidence("supervised_tokens known_good_batch", "fp32", supervised_tokens=told)
    for micro, first in ((1, "nothing_supervised"), (0, "loss_math")):
        suspects = at("(loss)", "aten.div.Tensor", nan=True, micro=micro, input_amax=3.0)
        assert named(case(suspects=suspects, evidence=found))[0] == first
