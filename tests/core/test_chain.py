"""Chained lines: every bit counts, and a damaged place condemns nothing but itself."""

from __future__ import annotations

import io
import json
import math
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finitune.core.chain import (
    NOTHING,
    Damage,
    Reason,
    backwards,
    checked,
    encode,
    end_of,
    number,
    parse,
    seal,
    sealed_link,
)
from finitune.core.messages.catalogue import set_language


def chain_of(*records: dict, prev: int = NOTHING) -> list[bytes]:
    lines = []
    for record in records:
        lines.append(seal({"schema": 2, "kind": "step", **record}, prev))
        prev = sealed_link(lines[-1])
    return lines


SEAL_BYTES = len(b', "prev": "00000000", "crc": "00000000"}\n')
LINES = chain_of(*({"step": step, "text": "JN\u00e9"} for step in range(1, 8)))


def steps(lines: list[bytes]) -> list[int]:
    return [item["step"] for item in checked(lines) if isinstance(item, dict)]


def damages(lines: list[bytes]) -> list[tuple[int, Reason]]:
    return [(item.line, item.reason) for item in checked(lines) if isinstance(item, Damage)]


@given(st.floats())
def test_number_reads_back_what_encode_wrote(value: float) -> None:
    back = number(json.loads(json.dumps(encode(value))))
    assert back == value or (math.isnan(back) and math.isnan(value))


keys = st.text() | st.none() | st.booleans() | st.integers()
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda k: k not in ("prev", "crc")), values, max_size=4))
@example({"text": "\ud800", "loss": math.nan, "zero": -0.0, "tiny": 5e-324})
def test_any_record_comes_back_as_encode_spells_it(record: dict) -> None:
    line = seal({**record, "kind": "x", "schema": 2}, 7)
    assert line.count(b"\n") == 1
    found = parse(line)
    assert found.reason is None
    assert (found.prev, found.link) == (7, sealed_link(line))
    assert repr(found.record) == repr(encode({**record, "kind": "x", "schema": 2}))


def test_the_checksum_is_the_crc_of_all_bytes_before_it() -> None:
    import zlib

    for before, line in pairwise(LINES):
        body, _, crc = line.rpartition(b', "crc": ')
        assert crc == b'"%08x"}\n' % zlib.crc32(body)
        assert json.loads(line)["prev"] == json.loads(before)["crc"]
    assert json.loads(LINES[0])["prev"] == "00000000"


def test_an_undisturbed_chain_has_no_damage() -> None:
    assert steps(LINES) == [1, 2, 3, 4, 5, 6, 7]
    assert damages(LINES) == []


@pytest.mark.parametrize("place", range(len(LINES)))
@pytest.mark.parametrize("bit", range(8))
def test_every_single_bit_of_a_line_counts(place: int, bit: int) -> None:
    """The line itself is named, and no other; a line that became two, or one with the next, costs those."""
    for byte in range(len(LINES[place])):
        whole = bytearray(b"".join(LINES))
        at = sum(map(len, LINES[:place])) + byte
        whole[at] ^= 1 << bit
        lines = _split(bytes(whole))
        found = damages(lines)
        joined, split = len(lines) < len(LINES), len(lines) > len(LINES)
        lost = {place + 1, place + 2} if joined else {place + 1}
        assert steps(lines) == [s for s in range(1, 8) if s not in lost]
        if place == len(LINES) - 1 and not found:
            assert byte >= len(LINES[place]) - SEAL_BYTES, "only a line whose checksum was hit passes for a torn end"
        else:
            assert [line for line, _ in found] == ([place + 1, place + 2] if split else [place + 1]), byte


def _split(content: bytes) -> list[bytes]:
    *whole, rest = content.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


@pytest.mark.parametrize("place", range(len(LINES) - 1))
def test_a_missing_line_is_named_at_the_line_after_it_which_is_kept(place: int) -> None:
    lines = LINES[:place] + LINES[place + 1 :]
    assert damages(lines) == [(place + 1, Reason.GAP)]
    assert steps(lines) == [s for s in range(1, 8) if s != place + 1]


@pytest.mark.parametrize("place", range(len(LINES)))
@pytest.mark.parametrize("target", range(len(LINES) + 1))
def test_a_line_that_is_there_twice_is_named_once_and_nothing_is_lost(place: int, target: int) -> None:
    lines = [*LINES[:target], LINES[place], *LINES[target:]]
    found = damages(lines)
    assert len(found) == 1
    assert found[0][1] in (Reason.REPEATED, Reason.MISPLACED, Reason.GAP)
    if target > place:
        assert found == [(target + 1, Reason.REPEATED)]
        assert steps(lines) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("place", range(len(LINES) - 1))
def test_neighbours_that_changed_places_are_named(place: int) -> None:
    lines = [*LINES]
    lines[place : place + 2] = lines[place + 1], lines[place]
    assert damages(lines)[0] == (place + 1, Reason.MISPLACED)
    found = steps(lines)
    assert found == sorted(found)


@given(st.permutations(range(len(LINES))))
def test_no_order_but_the_true_one_is_without_damage(order: list[int]) -> None:
    assert (damages([LINES[i] for i in order]) == []) == (order == sorted(order))


@given(st.lists(st.sampled_from(range(len(LINES)))))
def test_any_selection_of_lines_is_either_a_beginning_or_damaged(chosen: list[int]) -> None:
    assert (damages([LINES[i] for i in chosen]) == []) == (chosen == list(range(len(chosen))))


def test_a_stranger_between_two_lines_is_passed_over() -> None:
    stranger = chain_of({"step": 99}, prev=4711)
    assert damages([*LINES[:3], *stranger, *LINES[3:]]) == [(4, Reason.MISPLACED)]
    assert steps([*LINES[:3], *stranger, *LINES[3:]]) == [1, 2, 3, 4, 5, 6, 7]


def test_a_line_bound_to_one_that_others_have_followed_is_passed_over() -> None:
    """Two writers at once, or an old copy of the file that was put behind the new one."""
    fork = chain_of({"step": 98}, {"step": 99}, prev=sealed_link(LINES[1]))
    assert damages([*LINES[:4], fork[0]]) == [(5, Reason.MISPLACED)]
    assert damages([*LINES[:4], fork[0], *LINES[4:]]) == [(5, Reason.MISPLACED)]
    assert steps([*LINES[:4], fork[0], *LINES[4:]]) == [1, 2, 3, 4, 5, 6, 7]


def test_lines_of_schema_1_are_taken_unchecked_and_the_first_checked_one_is_bound_to_them() -> None:
    old = [b'{"schema": 1, "kind": "step", "step": 1}\n', b'{"kind": "step", "step": 2}\n']
    lines = [*old, *chain_of({"step": 3}, {"step": 4}, prev=parse(old[-1]).link)]
    assert damages(lines) == []
    assert steps(lines) == [1, 2, 3, 4]
    changed = [old[0], old[1].replace(b"2", b"5"), *lines[2:]]
    assert damages(changed) == [(3, Reason.GAP)]


def test_a_line_without_checksum_among_checked_ones_is_refused() -> None:
    lines = [*LINES[:2], b'{"schema": 1, "kind": "step", "step": 99}\n', *LINES[2:]]
    assert damages(lines) == [(3, Reason.UNCHECKED)]
    assert 99 not in steps(lines)


def test_a_line_whose_seal_was_cut_off_does_not_pass_as_an_old_one() -> None:
    bare = b'{"schema": 2, "kind": "step", "step": 1}\n'
    assert damages([bare, *LINES[1:]])[0] == (1, Reason.BITS)


@pytest.mark.parametrize("text", [b"[1, 2]\n", b'{"schema": 2}\n', b"3\n"])
def test_json_that_is_no_record_is_named(text: bytes) -> None:
    assert damages([*LINES[:2], text, *LINES[2:]]) == [(3, Reason.NO_RECORD)]
    assert steps([*LINES[:2], text, *LINES[2:]]) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("text", [b'{"kind": NaN}\n', b"\n", b"\xff\n", b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n"])
def test_what_is_not_strict_json_is_named(text: bytes) -> None:
    assert damages([*LINES[:2], text, *LINES[2:]]) == [(3, Reason.NOT_JSON)]


def test_a_torn_end_is_no_damage() -> None:
    for end in (LINES[3][:-1], LINES[3][:20], b"\0" * 30, b"garbage\n"):
        assert damages([*LINES[:3], end]) == []
        assert steps([*LINES[:3], end]) == [1, 2, 3]


def test_what_comes_after_an_unfinished_line_is_left_for_the_next_reading() -> None:
    """A reader beside a writer meets the first half at the end of the file, and then the rest."""
    assert steps([*LINES[:3], LINES[3][:20], LINES[3][20:], LINES[4]]) == [1, 2, 3]


@given(st.lists(st.sampled_from([*LINES, *(line[:-1] for line in LINES)]) | st.binary(max_size=40)))
def test_any_lines_are_read_without_an_exception(lines: list[bytes]) -> None:
    found = list(checked(lines))
    assert all(isinstance(item, (dict, Damage)) for item in found)
    assert len([item for item in found if isinstance(item, dict)]) <= len(lines)


def test_a_damage_speaks_both_languages() -> None:
    assert str(Damage(7, Reason.GAP)) == "line 7: a line is missing before this one"
    try:
        set_language("zh")
        assert {str(Damage(7, reason)) for reason in Reason}.isdisjoint({f"line 7: {r.value}" for r in Reason})
    finally:
        set_language(None)


@settings(deadline=None)
@given(st.binary() | st.lists(st.sampled_from([b"\n", b"a", b"\r", b"long" * 40_000])).map(b"".join), st.integers(0))
def test_backwards_gives_the_lines_of_any_file_in_reverse(tmp_path_factory, content: bytes, cut: int) -> None:
    size = cut % (len(content) + 1)
    path = tmp_path_factory.mktemp("backwards") / "file"
    path.write_bytes(content)
    with path.open("rb") as handle:
        assert list(backwards(handle, size)) == _split(content[:size])[::-1]


def test_backwards_reads_a_long_line_in_growing_blocks() -> None:
    class Counting(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.reads += 1
            return super().read(size)

    handle = Counting(b"a" * 64_000_000)
    assert len(next(backwards(handle, 64_000_000))) == 64_000_000
    assert handle.reads < 20


@pytest.mark.parametrize(
    ("content", "expected_torn"),
    [
        (b"", 0),
        (b"".join(LINES[:2]), 0),
        (b"".join(LINES[:2]) + LINES[2][:-1], len(LINES[2]) - 1),
        (b"".join(LINES[:2]) + b"garbage\n", 8),
        (b"".join(LINES[:2]) + b"garbage\nrest", 4),
        (b"rest", 4),
        (b"\0" * 200_000, 200_000),
    ],
)
def test_the_end_of_the_whole_lines_is_found(tmp_path, content: bytes, expected_torn: int) -> None:
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as handle:
        end = end_of(handle, len(content))
    assert (end.num_bytes, end.torn_bytes) == (len(content) - expected_torn, expected_torn)
    whole = _split(content[: end.num_bytes])
    assert end.link == (parse(whole[-1]).link if whole else NOTHING)
