"""A fingerprint tells every changed bit, and says where it is."""

from __future__ import annotations

import base64
import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.numerics.fingerprint import RECORD, Fingerprint, checksum, fingerprint, first_difference

FLOATS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}
DTYPES = {**FLOATS, torch.int64: 8, torch.int32: 4, torch.uint8: 1}
NUMBER_OF_TENSORS = "(number of tensors)"
DIGEST = "(digest)"


def of_bytes(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


def of_bits(bits: int) -> torch.Tensor:
    """One fp32 number with this pattern."""
    return torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)


def state(*shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def mark_of(found: Fingerprint) -> dict:
    """As it comes back from a journal line."""
    return json.loads(json.dumps(found.to_json()))


@st.composite
def any_state(draw: st.DrawFn) -> list[tuple[str, bytes, torch.dtype, tuple[int, ...]]]:
    """Tensors of all kinds with arbitrary bits, so with NaN patterns, infinities, subnormals, zeros of both signs."""
    found = []
    for i in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2), (0,), (0, 3)]))
        size = DTYPES[dtype] * math.prod(shape)
        found.append((f"layer.{i}", draw(st.binary(min_size=size, max_size=size)), dtype, shape))
    return found


def built(parts: list[tuple[str, bytes, torch.dtype, tuple[int, ...]]]) -> list[tuple[str, torch.Tensor]]:
    return [(name, of_bytes(raw, dtype, shape)) for name, raw, dtype, shape in parts]


@given(any_state(), st.data())
@settings(max_examples=150, deadline=None)
def test_one_flipped_bit_in_any_tensor_is_seen_and_its_tensor_named(parts: list, data: st.DataObject) -> None:
    before = fingerprint(built(parts), {"step": 3})
    full = [i for i, (_, raw, _, _) in enumerate(parts) if raw]
    if not full:
        return
    at = data.draw(st.sampled_from(full))
    name, raw, dtype, shape = parts[at]
    place = data.draw(st.integers(0, 8 * len(raw) - 1))
    spoilt = bytearray(raw)
    spoilt[place // 8] ^= 1 << place % 8
    changed = [*parts[:at], (name, bytes(spoilt), dtype, shape), *parts[at + 1 :]]
    after = fingerprint(built(changed), {"step": 3})
    assert after.digest != before.digest
    assert after.record_sum == before.record_sum
    assert first_difference(mark_of(before), after) == name
    assert first_difference(mark_of(after), before) == name


@given(any_state())
@settings(max_examples=50, deadline=None)
def test_the_same_bits_give_the_same_fingerprint_and_no_difference(parts: list) -> None:
    first, second = fingerprint(built(parts), {"a": 1}), fingerprint(built(parts), {"a": 1})
    assert first == second
    assert first_difference(mark_of(first), second) is None


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_minus_zero_is_not_zero(dtype: torch.dtype) -> None:
    zero = torch.zeros(4, dtype=dtype)
    minus = zero.clone()
    minus.view(torch.uint8)[-1] = 0x80  # the sign of the last number, little endian
    assert torch.equal(zero, minus)
    assert checksum(zero) != checksum(minus)


def test_every_nan_pattern_has_a_checksum_of_its_own() -> None:
    patterns = [0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFC00000, 0xFF800001, 0x7FFFFFFF]
    tensors = [of_bits(p) for p in patterns]
    assert all(bool(torch.isnan(t).all()) for t in tensors)
    others = [of_bits(p) for p in (0x7F800000, 0xFF800000, 0x00000001, 0x80000001, 0x00000000, 0x80000000)]
    assert len({checksum(t) for t in [*tensors, *others]}) == len(patterns) + 6


def test_the_same_bits_of_another_type_or_shape_differ() -> None:
    zeros = torch.zeros(2, 3)
    same_bytes = [
        zeros,
        zeros.view(torch.int32),
        zeros.view(torch.uint8),
        zeros.reshape(3, 2),
        zeros.reshape(6),
        zeros.reshape(1, 6),
        zeros.view(torch.float16),
        zeros.view(torch.bfloat16),
    ]
    assert len({checksum(t) for t in same_bytes}) == len(same_bytes)


def test_empty_tensors_are_told_apart_by_type_and_shape() -> None:
    empty = [
        torch.empty(0),
        torch.empty(0, 3),
        torch.empty(3, 0),
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, dtype=torch.bool),
    ]
    assert len({checksum(t) for t in empty}) == len(empty)
    assert all(checksum(t) == checksum(t.clone()) for t in empty)


def test_a_number_without_dimensions_is_not_a_vector_of_one() -> None:
    number = torch.tensor(2.5)
    assert checksum(number) == checksum(torch.tensor(2.5))
    assert checksum(number) != checksum(torch.tensor([2.5]))
    assert checksum(number) != checksum(torch.tensor(2.5, dtype=torch.bfloat16))


def test_truth_values_count() -> None:
    mask = torch.tensor([True, False, True])
    assert checksum(mask) == checksum(mask.clone())
    assert len({checksum(mask), checksum(~mask), checksum(mask.to(torch.uint8))}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_values_count_and_not_how_they_lie_in_memory(dtype: torch.dtype) -> None:
    whole = (torch.arange(48).reshape(6, 8) % 5).to(dtype)
    views = [whole.t(), whole[::2], whole[:, 1:4], whole[2:3].expand(4, 8), whole.reshape(2, 3, 8).permute(2, 0, 1)]
    for view in views:
        assert checksum(view) == checksum(view.contiguous().clone())
    assert checksum(whole.t()) != checksum(whole.reshape(8, 6))


def test_looking_changes_nothing_and_takes_parameters() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    before = parameter.detach().clone()
    assert checksum(parameter) == checksum(before)
    assert torch.equal(parameter.detach(), before)
    assert parameter.grad is None


def test_the_first_of_several_differing_tensors_is_named() -> None:
    tensors = state((2,), (3,), (4,), (5,))
    before = fingerprint(tensors.items(), {})
    tensors["t1"][0] += 1
    tensors["t3"][0] += 1
    assert first_difference(before.to_json(), fingerprint(tensors.items(), {})) == "t1"


def test_two_tensors_that_changed_places_are_seen() -> None:
    tensors = state((3,), (3,), (3,))
    before = fingerprint(tensors.items(), {})
    swapped = {"t0": tensors["t0"], "t1": tensors["t2"], "t2": tensors["t1"]}
    assert first_difference(before.to_json(), fingerprint(swapped.items(), {})) == "t1"


def test_names_and_their_order_are_part_of_the_digest() -> None:
    tensors = state((3,), (3,))
    before = fingerprint(tensors.items(), {})
    renamed = fingerprint([("t0", tensors["t0"]), ("other", tensors["t1"])], {})
    reordered = fingerprint([("t1", tensors["t1"]), ("t0", tensors["t0"])], {})
    assert len({before.digest, renamed.digest, reordered.digest}) == 3
    assert first_difference(before.to_json(), renamed) is not None
    assert first_difference(before.to_json(), reordered) is not None


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_missing_tensors_cannot_be_compared_one_by_one(keep: int) -> None:
    tensors = state((3,), (4,), (5,))
    before = fingerprint(tensors.items(), {})
    fewer = fingerprint(list(tensors.items())[:keep], {})
    assert first_difference(before.to_json(), fewer) == NUMBER_OF_TENSORS
    assert first_difference(fewer.to_json(), before) == NUMBER_OF_TENSORS


def test_a_state_of_no_tensors_at_all_has_a_fingerprint() -> None:
    empty = fingerprint([], {"step": 0})
    assert first_difference(mark_of(empty), fingerprint([], {"step": 0})) is None
    assert first_difference(mark_of(empty), fingerprint([], {"step": 1})) == RECORD


CHANGES = {
    "a number": ({"loss": 1.0}, {"loss": 1.0000000000000002}),
    "the sign of zero": ({"loss": 0.0}, {"loss": -0.0}),
    "NaN for none": ({"first": None}, {"first": math.nan}),
    "which infinity": ({"x": math.inf}, {"x": -math.inf}),
    "a whole number for a real one": ({"x": 1}, {"x": 1.0}),
    "a truth value for a number": ({"x": 1}, {"x": True}),
    "deep inside": ({"a": {"b": [1, 2, {"c": 3}]}}, {"a": {"b": [1, 2, {"c": 4}]}}),
    "a longer list": ({"a": [1, 2]}, {"a": [1, 2, 2]}),
    "another name": ({"a": 1}, {"b": 1}),
    "one more": ({"a": 1}, {"a": 1, "b": None}),
    "a text": ({"a": "x"}, {"a": "y"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_record_is_called_the_record(change: str) -> None:
    was, now = CHANGES[change]
    tensors = state((3,))
    before, after = fingerprint(tensors.items(), was), fingerprint(tensors.items(), now)
    assert before.record_sum != after.record_sum
    assert first_difference(mark_of(before), after) == RECORD


def test_the_record_comes_back_from_json_with_the_same_fingerprint() -> None:
    """State goes through state.json: tuples, non-finite numbers and the order of keys must not matter."""
    record = {"b": (1, 2.5), "a": {"x": math.nan, "y": -math.inf, "z": -0.0}, "c": [5e-324, 1e308, 0.1]}
    again = {"c": [5e-324, 1e308, 0.1], "a": {"z": -0.0, "y": "-Infinity", "x": "NaN"}, "b": [1, 2.5]}
    assert fingerprint([], record).digest == fingerprint([], again).digest


def test_a_tensor_is_named_before_the_record() -> None:
    tensors = state((3,), (3,))
    before = fingerprint(tensors.items(), {"step": 1})
    tensors["t1"][2] = 9.0
    assert first_difference(before.to_json(), fingerprint(tensors.items(), {"step": 2})) == "t1"


def test_where_tensors_and_record_agree_the_record_is_not_blamed() -> None:
    """A renamed tensor, or a digest that was changed in the journal: the record has the journalled checksum."""
    tensors = state((3,), (4,))
    before = fingerprint(tensors.items(), {"step": 1})
    renamed = fingerprint([("x", tensors["t0"]), ("t1", tensors["t1"])], {"step": 1})
    assert first_difference(before.to_json(), renamed) == DIGEST
    assert first_difference({**before.to_json(), "digest": "0" * 32}, before) == DIGEST


def packed(*sums: int) -> str:
    return base64.b64encode(struct.pack(f"<{len(sums)}I", *sums)).decode()


GARBAGE = {
    "nothing": {},
    "no tensors": {"digest": "x"},
    "tensors is a number": {"digest": "x", "tensors": 5, "record": 1},
    "tensors is null": {"digest": "x", "tensors": None},
    "tensors is a list": {"digest": "x", "tensors": [1, 2]},
    "no base64": {"digest": "x", "tensors": "not base64!"},
    "cut base64": {"digest": "x", "tensors": packed(1, 2)[:-1]},
    "no ASCII": {"digest": "x", "tensors": "数字"},
    "half a checksum": {"digest": "x", "tensors": base64.b64encode(b"abc").decode()},
    "digest of another type": {"digest": ["x"], "tensors": {"a": 1}},
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_mark_that_is_none_is_told_and_raises_nothing(kind: str) -> None:
    assert first_difference(GARBAGE[kind], fingerprint(state((3,)).items(), {})) == DIGEST


@pytest.mark.parametrize("mark", [None, 5, 1.5, "text", [], ["digest"], True])
def test_a_mark_that_is_not_even_a_record_is_told_and_raises_nothing(mark: object) -> None:
    assert first_difference(mark, fingerprint(state((3,)).items(), {})) == DIGEST  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["digest", "tensors", "record", "x"]), JSON | st.binary().map(repr)))
@settings(max_examples=60, deadline=None)
def test_no_mark_whatever_raises(mark: dict) -> None:
    found = first_difference(mark, fingerprint(state((3,)).items(), {}))
    assert isinstance(found, str)


def test_the_journalled_mark_is_small_and_strict_json() -> None:
    """4 bytes a tensor and some 100 more."""
    tensors = [(f"model.layers.{i}.weight|exp_avg", torch.tensor([float(i)])) for i in range(300)]
    line = json.dumps(fingerprint(tensors, {"x": math.nan}).to_json(), allow_nan=False)
    assert len(line) < 300 * 4 * 4 / 3 + 150
