"""The journal hides nothing and survives a torn end; its disk is another file's matter."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finitune.core import journal as subject
from finitune.core.journal import SCHEMA, Damage, Journal, Reason, check, read, read_checked, tail, torn_bytes
from support.journals import NOW_S, StandingClock, put, steps, undisturbed

REAL_WRITE = os.write
FIXTURES = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> StandingClock:
    return StandingClock(monkeypatch)


# ---- what is written ----


def test_records_come_back_in_order_with_schema_and_kind(path: Path) -> None:
    journal = Journal(path)
    journal.write("step", step=1, loss=2.5)
    journal.write("end")
    journal.close()
    first, last = read(path)
    assert first == {"schema": SCHEMA, "kind": "step", "time": NOW_S, "step": 1, "loss": 2.5}
    assert last["kind"] == "end"
    assert check(path) == []


def test_non_finite_numbers_are_spelled_out_and_every_line_is_strict_json(path: Path) -> None:
    journal = Journal(path)
    journal.write("step", loss=math.nan, nested={"norms": [math.inf, -math.inf, -0.0, 5e-324]})
    journal.close()

    def refuse(token: str) -> None:
        raise AssertionError(f"bare {token}")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["loss"] == "NaN"
    assert line["nested"]["norms"][:2] == ["Infinity", "-Infinity"]
    assert math.copysign(1, line["nested"]["norms"][2]) == -1
    assert line["nested"]["norms"][3] == 5e-324


def test_every_record_is_in_the_file_when_write_returns(path: Path) -> None:
    journal = Journal(path)
    for step in range(1, 4):
        journal.write("step", step=step)
        assert steps(path) == list(range(1, step + 1))
        assert tail(path, 1)[0]["step"] == step
        assert (journal.fault, journal.pending_bytes, journal.waiting()) == (None, 0, [])
    journal.close()


def test_a_journal_that_is_opened_again_goes_on_with_the_chain(path: Path) -> None:
    for step in range(1, 6):
        journal = Journal(path)
        put(journal, step, step)
        journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 5)


def test_the_link_stands_for_everything_said(path: Path) -> None:
    journal = Journal(path)
    assert journal.link == "00000000"
    put(journal, 1, 3)
    assert json.loads(path.read_text().splitlines()[-1])["crc"] == journal.link
    journal.close()
    again = Journal(path)
    assert again.link == journal.link
    again.close()


def test_a_journal_of_schema_1_is_read_and_continued(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"schema": 1, "kind": "step", "step": 1}\n{"schema": 1, "ki')
    journal = Journal(path)
    assert journal.cut_bytes == 17
    put(journal, 2, 3)
    journal.close()
    assert steps(path) == [1, 2, 3]
    assert check(path) == []
    path.write_text(path.read_text().replace('"step": 1}', '"step": 7}'))
    assert [(d.line, d.reason) for d in check(path)] == [(2, Reason.GAP)]


def test_the_fields_of_the_chain_are_not_for_records(path: Path) -> None:
    journal = Journal(path)
    for name in ("schema", "prev", "crc"):
        with pytest.raises(ValueError, match="the journal's own"):
            journal.write("step", **{name: 1})
    assert path.read_bytes() == b""
    journal.close()


def test_a_closed_journal_takes_nothing_and_closes_again(path: Path) -> None:
    journal = Journal(path)
    journal.close()
    journal.close()
    for action in (lambda: journal.write("step"), journal.sync, journal.reopen):
        with pytest.raises(ValueError, match="is closed"):
            action()


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Journal(tmp_path / "file" / "journal.jsonl")


# ---- torn and damaged files ----


def test_a_journal_cut_anywhere_gives_the_whole_lines_before_and_goes_on_behind_them(tmp_path: Path) -> None:
    whole = undisturbed(tmp_path, 4)
    path = tmp_path / "torn"
    for kept in range(len(whole) + 1):
        path.write_bytes(whole[:kept])
        num_whole = whole[:kept].count(b"\n")
        assert steps(path) == list(range(1, num_whole + 1))
        assert check(path) == []
        torn = kept - (whole.rfind(b"\n", 0, kept) + 1)
        assert torn_bytes(path) == torn
        journal = Journal(path)
        assert journal.cut_bytes == torn
        put(journal, num_whole + 1, 4)
        journal.abandon()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("bit", [0, 3, 5])
def test_any_changed_bit_is_found_or_hits_the_torn_end_only(tmp_path: Path, bit: int) -> None:
    whole = undisturbed(tmp_path, 3)
    path = tmp_path / "changed"
    for byte in range(len(whole)):
        content = bytearray(whole)
        content[byte] ^= 1 << bit
        path.write_bytes(content)
        torn = torn_bytes(path)
        assert check(path) or torn, byte
        assert not torn or byte >= whole.rfind(b"\n", 0, -1), byte
        assert set(steps(path)) <= {1, 2, 3}


def test_damage_in_the_middle_stays_as_it_is_and_the_chain_goes_on(path: Path) -> None:
    journal = Journal(path)
    put(journal, 1, 4)
    journal.close()
    path.write_bytes(path.read_bytes().replace(b'"step": 4', b'"step": 5').replace(b'"step": 2', b'"step": 8'))
    journal = Journal(path)
    put(journal, 6, 7)
    journal.close()
    assert check(path) == [Damage(2, Reason.BITS), Damage(4, Reason.BITS)]
    assert steps(path) == [1, 3, 6, 7]
    assert [i if isinstance(i, Damage) else i["step"] for i in read_checked(path)] == [
        1, Damage(2, Reason.BITS), 3, Damage(4, Reason.BITS), 6, 7,
    ]  # fmt: skip


@settings(**FIXTURES)
@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"\n", b"{}", b'{"kind": "x"}', b"\0"])).map(b"".join))
def test_any_bytes_are_a_journal_that_can_be_read_and_continued(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "j"
    path.write_bytes(content)
    before = list(read(path))
    assert len(tail(path, 100)) >= len(before)
    damage = check(path)
    journal = Journal(path)
    journal.write("resume", step=1)
    journal.close()
    assert path.read_bytes().startswith(content[: len(content) - journal.cut_bytes])
    assert check(path) == damage
    assert list(read(path)) == [*before, {"schema": SCHEMA, "kind": "resume", "time": NOW_S, "step": 1}]


def test_opening_and_tail_read_the_end_of_a_big_file_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    put(journal, 1, 5000)
    journal.close()
    parsed: list[bytes] = []
    real = subject.chain.parse
    monkeypatch.setattr(subject.chain, "parse", lambda raw: parsed.append(raw) or real(raw))
    Journal(path).close()
    assert len(parsed) == 1
    assert [r["step"] for r in tail(path, 3)] == [4998, 4999, 5000]
    assert len(parsed) == 4


def test_tail_passes_over_the_damaged_and_gives_all_where_there_are_fewer(path: Path) -> None:
    journal = Journal(path)
    put(journal, 1, 4)
    journal.close()
    path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"step": 8') + b'{"torn')
    assert [r["step"] for r in tail(path, 2)] == [2, 4]
    assert [r["step"] for r in tail(path, 9)] == [1, 2, 4]
    assert tail(path, 0) == []


def test_a_journal_is_read_while_another_thread_writes_it_in_pieces(path: Path, monkeypatch) -> None:
    def in_pieces(descriptor: int, content: bytes) -> int:
        count = REAL_WRITE(descriptor, content[:23])
        time.sleep(1e-5)
        return count

    monkeypatch.setattr(os, "write", in_pieces)
    journal = Journal(path)
    writer = threading.Thread(target=put, args=(journal, 1, 150))
    writer.start()
    counts = [0]
    while writer.is_alive():
        found = [i if isinstance(i, Damage) else i["step"] for i in read_checked(path)]
        assert found == list(range(1, len(found) + 1))
        counts.append(len(found))
    writer.join()
    journal.close()
    assert counts == sorted(counts)
    assert steps(path) == list(range(1, 151))
