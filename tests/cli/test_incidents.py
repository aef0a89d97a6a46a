"""``finitune incidents``: the list and one incident, on whole, damaged and unfinished runs."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing

import pytest

from finitune.cli import main as program
from finitune.core.chain import encode
from finitune.core.incident import Cause, Diagnosis, Incident, Trigger
from finitune.core.journal import Journal
from finitune.core.types import Finding, Severity


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    if "incidents" not in program.COMMANDS:
        monkeypatch.setattr(program, "COMMANDS", (*program.COMMANDS, "incidents", "replay"))


def incident(number: int, outcome: str = "cured", **changes) -> Incident:
    finding = Finding("NUM001", Severity.ERROR, "", {"loss": float("nan")}, (), True)
    cause = Cause("learning_rate", "OPT401", "I", 0.9, True, ("lower_lr",), (), "", {})
    made = Incident(number, 10 * number, 10 * number, Trigger.LOSS, finding, {"loss": float("nan")})
    made.outcome, made.diagnosis, made.replays = outcome, Diagnosis((cause,)), 7.0
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def run(tmp_path):
    """A run with incidents in its journal: call with incidents."""

    def write(*incidents: Incident):
        folder = tmp_path / "runs" / "demo"
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text("max_steps: 90\n")
        with closing(Journal(folder / "journal.jsonl")) as journal:
            journal.write("start", step=0, total_steps=90)
            for made in incidents:
                journal.write("incident", step=made.step, incident=made.to_json())
        return folder

    return write


def test_a_run_without_incidents_is_good(cli, run) -> None:
    run()
    done = cli("incidents", "runs/demo")
    assert done.code == 0
    assert "no incidents" in done.out


def test_the_list_has_a_line_for_each_and_is_good_when_all_are_settled(cli, run) -> None:
    run(incident(1), incident(2, "passed"))
    done = cli("incidents")
    assert done.code == 0
    assert done.out.count("OPT401") == 2
    assert "finitune incidents" in done.out


@pytest.mark.parametrize("outcome", ["halted", "observed", ""])
def test_one_that_is_not_settled_is_a_finding(cli, run, outcome) -> None:
    run(incident(1), incident(2, outcome))
    assert cli("incidents").code == 1
    assert cli("incidents", "latest", "1").code == 0
    assert cli("incidents", "latest", "2").code == 1


def test_one_incident_is_told_in_full(cli, run) -> None:
    run(incident(1))
    done = cli("incidents", "runs/demo", "1")
    assert "Incident 1 at step 10" in done.out
    assert "OPT401" in done.out
    assert "why" in done.out
    assert "原因" in cli("incidents", "runs/demo", "1", "--lang", "zh").out
    assert cli("incidents", "runs/demo", "1", "--markdown").out.startswith("# Incident 1")


def test_json_holds_the_records(cli, run) -> None:
    run(incident(1), incident(2))
    listed = cli("incidents", "--json").record
    assert [i["number"] for i in listed["incidents"]] == [1, 2]
    one = cli("incidents", "latest", "2", "--json").record
    assert one["incident"]["number"] == 2
    assert one["summary"][0].startswith("Incident 2")


def test_a_number_that_is_not_there_names_those_that_are(cli, run) -> None:
    run(incident(1), incident(2))
    done = cli("incidents", "latest", "5")
    assert done.code == 2
    assert "SYS417" in done.err
    assert "1, 2" in done.err


def test_what_is_no_run_is_said(cli, tmp_path) -> None:
    for name in ("absent", str(tmp_path), "latest", "a\x1b[2J"):
        done = cli("incidents", name)
        assert done.code == 2
        assert "SYS031" in done.err
        assert "\x1b" not in done.err


def test_the_folder_tells_what_the_journal_has_lost(cli, run) -> None:
    folder = run(incident(1))
    for made in (incident(1, "halted"), incident(2)):
        place = folder / "incidents" / f"{made.number:03d}"
        place.mkdir(parents=True)
        (place / "incident.json").write_text(json.dumps(encode(made.to_json())))
    found = cli("incidents", "--json").record["incidents"]
    assert [(i["number"], i["outcome"]) for i in found] == [(1, "cured"), (2, "cured")]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"number": "x"}', b'{"number": 1e999}', b"null"]
)
def test_damaged_files_are_named_and_the_rest_is_told(cli, run, content) -> None:
    folder = run(incident(1))
    (folder / "incidents" / "002").mkdir(parents=True)
    (folder / "incidents" / "002" / "incident.json").write_bytes(content)
    with (folder / "journal.jsonl").open("ab") as handle:
        handle.write(b"\xff\n{}\n")
    done = cli("incidents")
    assert done.code == 1
    assert "OPT401" in done.out
    assert "could not be read" in done.out
    assert "incidents/002/incident.json" in done.out
    assert "Traceback" not in done.err


def test_a_journal_that_is_being_written_is_read(cli, run) -> None:
    folder = run(incident(1))
    with (folder / "journal.jsonl").open("ab") as handle:
        handle.write(b'{"kind": "incident", "incident": {"num')
    assert cli("incidents").code == 0


def test_an_incident_record_of_another_program_is_no_crash(cli, run) -> None:
    folder = run(incident(1))
    with closing(Journal(folder / "journal.jsonl")) as journal:
        journal.write("incident", step=3, incident={"number": 3})
        journal.write("incident", step=4)
    done = cli("incidents")
    assert done.code == 1
    assert "OPT401" in done.out


def test_the_list_loads_no_torch(run) -> None:
    folder = run(incident(1))
    code = (
        "import sys; from finitune.cli import main; "
        "main.COMMANDS = tuple(dict.fromkeys((*main.COMMANDS, 'incidents'))); "
        f"main.main(['incidents', {str(folder)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "OPT401" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("False")
