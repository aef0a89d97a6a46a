"""Nests of many kinds are taken apart and put together again: rows, copies in free places, tokens, content hashes."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finitune.adapters import bare_batch as nests
from finitune.engine.conditions import NotPossible


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Named:
    x: Tensor
    scale: float


def rows_of(count: int, *sizes: int) -> Tensor:
    """Row i holds nothing but i."""
    return torch.arange(count).view(-1, *[1] * len(sizes)).expand(count, *sizes).clone()


def kinds(count: int) -> list[Any]:
    x, y = rows_of(count, 3), rows_of(count)
    return [
        x,
        (x, y),
        [x, y],
        {"x": x, "y": y},
        OrderedDict(x=x),
        UserDict(x=x, more={"y": (y, None)}),
        Pair(x, y),
        Named(x.float(), 2.0),
        {"x": x, "name": "all rows", "n": 3, "nothing": None},
        {"x": x.bool(), "z": x.to(torch.bfloat16), "c": torch.complex(x.float(), x.float())},
    ]


@pytest.mark.parametrize("kind", range(len(kinds(1))))
def test_rows_are_picked_from_every_kind_of_nest(kind: int) -> None:
    nest = kinds(5)[kind]
    part = nests.picked(nest, [4, 1])
    assert type(part) is type(nest)
    for was, now in zip(nests.tensors(nest), nests.tensors(part), strict=True):
        assert torch.equal(now, was[[4, 1]])
        assert now.dtype == was.dtype


@pytest.mark.parametrize("kind", range(len(kinds(1))))
def test_every_row_has_a_hash_of_its_own_that_goes_with_it(kind: int) -> None:
    nest = kinds(4)[kind]
    digests = nests.row_digests(nest)
    assert nests.row_digests(nests.picked(nest, [2, 0])) == [digests[2], digests[0]]
    assert len(digests) == 4


@given(count=st.integers(1, 9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_selected_rows_stay_in_place_and_only_they_come_up(count: int, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    order = nests.filled(sorted(kept), count)
    assert len(order) == count
    assert set(order) == kept
    assert all(order[i] == i for i in kept)


def nested() -> st.SearchStrategy[Any]:
    """Nests of tensors of 3 rows, plain values among them."""
    shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)
    dtypes = st.sampled_from([torch.float32, torch.int64, torch.float16, torch.bool])
    leaf = st.builds(lambda s, d: torch.ones((3, *s)).cumsum(0).to(d), shapes, dtypes)
    plain = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.floats(allow_nan=False))
    return st.recursive(
        st.one_of(leaf, plain),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
        ),
        max_leaves=6,
    )


@given(nested())
@settings(max_examples=80, deadline=None)
def test_any_nest_is_picked_whole_or_refused_with_a_reason(nest: Any) -> None:
    if not nests.tensors(nest):
        with pytest.raises(NotPossible, match="first dimension"):
            nests.picked(nest, [0, 1, 2])
        return
    part = nests.picked(nest, [0, 1, 2])
    assert [t.shape for t in nests.tensors(part)] == [t.shape for t in nests.tensors(nest)]
    assert all(torch.equal(a, b) for a, b in zip(nests.tensors(part), nests.tensors(nest), strict=True))
    assert nests.row_digests(part) == nests.row_digests(nest)


def test_tensors_of_another_first_dimension_are_left_whole() -> None:
    batch = {"input_ids": rows_of(4, 6), "weights": torch.ones(9), "scale": torch.tensor(2.0)}
    part = nests.picked(batch, [3])
    assert part["input_ids"].tolist() == [[3] * 6]
    assert part["weights"] is batch["weights"]
    assert part["scale"] is batch["scale"]


def test_what_nobody_can_split_is_named_and_a_function_of_the_user_splits_it() -> None:
    class Images:
        pass

    batch = {"x": rows_of(3, 2), "images": Images()}
    with pytest.raises(NotPossible, match=r"images \(Images\).*split_rows"):
        nests.picked(batch, [0])
    with pytest.raises(NotPossible, match="row_ids"):
        nests.row_digests(batch)
    assert nests.picked(batch, [1], lambda b, i: b["x"][i]).tolist() == [[1, 1]]


@pytest.mark.parametrize("make", [lambda x: x.to_sparse(), lambda x: torch.nested.as_nested_tensor([x[0], x[1]])])
@pytest.mark.filterwarnings("ignore")
def test_sparse_and_nested_tensors_are_refused_by_name(make: Any) -> None:
    with pytest.raises(NotPossible, match=r"sparse or nested|first dimension"):
        nests.picked({"x": rows_of(2, 3), "s": make(rows_of(2, 3).float())}, [0])


def test_padding_does_not_change_the_hash_of_a_row() -> None:
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 1, 1]])
    labels = torch.tensor([[-100, 6, 7]])
    short = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    pad = torch.nn.functional.pad
    wide = {
        "input_ids": pad(ids, (0, 4)),
        "attention_mask": pad(mask, (0, 4)),
        "labels": pad(labels, (0, 4), value=-100),
    }
    assert nests.row_digests(short) == nests.row_digests(wide)
    other = {**short, "labels": torch.tensor([[-100, -100, 7]])}
    assert nests.row_digests(short) != nests.row_digests(other)


def test_the_hash_looks_at_bits() -> None:
    values = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45]
    digests = [nests.row_digests({"x": torch.tensor([[v]])})[0] for v in values]
    assert len(set(digests)) == len(values)
    assert digests[2] == nests.row_digests({"x": torch.tensor([[float("nan")]])})[0]


def test_after_a_prefix_labels_are_masked_and_ids_repeat() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4]]),
        "labels": torch.tensor([[1, 2, 3, 4]]),
        "attention_mask": torch.ones(1, 4),
        "weights": torch.tensor([[1.0, 2.0, float("nan"), float("inf")]]),
    }
    part = nests.beginning(batch, 2)
    assert part["input_ids"].tolist() == [[1, 2, 2, 2]]
    assert part["labels"].tolist() == [[1, 2, -100, -100]]
    assert part["weights"].tolist() == [[1.0, 2.0, 2.0, 2.0]]
    assert part["attention_mask"] is batch["attention_mask"]


def test_a_prefix_needs_labels_by_token() -> None:
    with pytest.raises(NotPossible, match="labels"):
        nests.beginning({"x": torch.ones(2, 3), "y": torch.ones(2)}, 1)


@pytest.mark.parametrize(
    ("batch", "supervised", "tokens"),
    [
        ({"input_ids": torch.ones(2, 3), "labels": torch.tensor([[1, -100, 2], [-100, -100, -100]])}, 2, 6),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, None, 3),
        ({"x": torch.ones(2, 3)}, None, 0),
        ({"labels": torch.full((2, 2), -100)}, 0, 0),
    ],
)
def test_supervised_tokens_are_counted_where_there_are_labels(batch: Any, supervised: Any, tokens: int) -> None:
    assert nests.num_supervised(batch) == supervised
    assert nests.num_tokens(batch) == tokens
