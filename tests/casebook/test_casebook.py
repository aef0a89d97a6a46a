"""The casebook: every page is whole, what links to it is right, and its transcript is what happens today."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from finitune.bench import casebook
from finitune.bench.cases import OURS, Case, cases
from finitune.bench.harness import run_case
from finitune.cli.bench import _seeds
from finitune.cli.main import main
from finitune.core.codes import all_codes
from finitune.core.messages.catalogue import LANGUAGES
from finitune.core.registry import load, names
from finitune.train.recipe_fields import fields

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PAGES = {page.name: page for _, page in casebook.pages(FOLDER)}
TEXTS = {name: (FOLDER / f"{name}.md").read_text(encoding="utf-8") for name in PAGES}
NOT_NAMED = "**Not named yet.**"
by_page = pytest.mark.parametrize("name", sorted(PAGES))


@by_page
def test_the_transcript_is_what_happens(name: str) -> None:
    page = PAGES[name]
    kind, fault, seed, contender = page.case.split("/")
    record = run_case(Case(kind, fault, int(seed), contender))
    differ = casebook.differences(page.transcript, casebook.transcript(record))
    assert not differ, "python -m finitune.bench.casebook --update\n" + "\n".join(differ)
    assert (NOT_NAMED in TEXTS[name]) == (record["cause"] != "right"), record["cause_said"]


def test_the_command_tells_the_transcript(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = PAGES["zero_row_norm"]
    main([*shlex.split(page.command)[1:], "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    told = (err + out).splitlines()[: len(page.transcript)]
    assert casebook.differences(page.transcript, told) == []


@by_page
def test_the_command_runs_this_case_and_no_other(name: str) -> None:
    page = PAGES[name]
    words = shlex.split(page.command)
    assert page.command == casebook.command_of(name)
    assert words[:2] == ["finitune", "bench"]
    options = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
    assert set(options) == {"--filter", "--seeds"}
    assert words[-1] == "--tell"
    chosen = cases(_seeds(options["--seeds"]), [options["--filter"]], heavy=True)
    assert [case.key for case in chosen] == [page.case]


@by_page
def test_the_front_matter_names_what_there_is(name: str) -> None:
    page = PAGES[name]
    kind, fault, seed, contender = page.case.split("/")
    assert (kind, fault, seed, contender) == ("faults", name, "0", OURS)
    assert page.fault_class == load("faults", fault).FAULT_CLASS
    assert set(page.codes) <= set(all_codes())


@by_page
def test_a_page_is_whole_and_short(name: str) -> None:
    page, content = PAGES[name], TEXTS[name]
    assert page.sections == casebook.SECTIONS
    assert page.title
    assert 40 <= len(content.splitlines()) <= 95
    prose = re.sub(r"^```.*?^```$", "", content, flags=re.DOTALL | re.MULTILINE).splitlines()
    assert max(len(line) for line in prose) <= 120
    assert re.search(r"\b[\w.-]+/[\w.-]+#\d+", content), "no public thread"
    assert content.isascii()


@by_page
def test_what_is_to_be_copied_is_python_and_recipe_keys(name: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", TEXTS[name], re.DOTALL | re.MULTILINE):
        compile(block, name, "exec")
    for block in re.findall(r"^```yaml\n(.*?)^```$", TEXTS[name], re.DOTALL | re.MULTILINE):
        assert set(_paths(yaml.safe_load(block))) <= set(fields())


def _paths(settings: dict[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def test_the_table_of_links_is_that_of_the_pages() -> None:
    assert {name: page.codes for name, page in PAGES.items()} == dict(casebook.PAGES)


def test_a_code_is_on_one_page() -> None:
    codes = [code for page in PAGES.values() for code in page.codes] + list(casebook.SYMPTOMS)
    assert len(codes) == len(set(codes))
    assert set(codes) <= set(all_codes())


def test_every_cause_has_a_page_or_does_no_harm() -> None:
    causes = {load("causes", name).CAUSE.code for name in names("causes")}
    assert {code for code in causes if casebook.page_of(code) is None} == {"NUM406"}


def test_every_class_has_a_page_or_a_reason() -> None:
    written = {page.fault_class for page in PAGES.values()}
    assert written | set(casebook.NO_PAGE) == set(casebook.CLASSES)
    assert not written & set(casebook.NO_PAGE)
    planted = {load("faults", name).FAULT_CLASS for name in names("faults")}
    assert not planted & set(casebook.NO_PAGE), "a fault that could have a page"
    print("\n".join(f"class {letter} has no page: {reason}" for letter, reason in casebook.NO_PAGE.items()))


def test_the_index_leads_to_every_page_and_to_nothing_else() -> None:
    content = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line for line in content.splitlines() if line.startswith("| ")][1:]
    led = [re.search(r"\((\w+)\.md\) \|$", row) for row in rows]
    assert all(led), rows
    assert sorted(found[1] for found in led if found) == sorted(PAGES)


@pytest.mark.parametrize("name", [*sorted(PAGES), casebook.INDEX])
def test_links_inside_lead_somewhere(name: str) -> None:
    assert (ROOT / casebook.path_of(name)).is_file()
    content = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    for target in re.findall(r"\b(\w+)\.md\b", content):
        assert (FOLDER / f"{target}.md").is_file(), target


# ---- the comparison can fail ----

LINE = "  proof   bf16 held on a replay 2 steps past the failure: losses 3.593, 3.389"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LINE, LINE),
        (LINE, LINE.replace("3.593", "3.594")),
        ("  cost    12.3 replays, 1.1 s, no row", "  cost    12.3 replays, 20.75 s, no row"),
        ("made 859648; ends at 65504", "made 859731; ends at 65504"),
        ("inputs up to 2.4174e+26", "inputs up to 2.4171e+26"),
    ],
)
def test_time_and_far_digits_count_for_nothing(old: str, new: str) -> None:
    assert casebook.differences([old], [new]) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LINE, LINE.replace("3.593", "3.693")),
        (LINE, LINE.replace("2 steps", "3 steps")),
        (LINE, LINE.replace("bf16", "fp32")),
        ("  cost    12.3 replays, 1.1 s, no row", "  cost    13.3 replays, 1.1 s, no row"),
        ("inputs up to 2.4174e+26", "inputs up to 2.4174e+27"),
        ("losses -0.318", "losses 0.318"),
        ("row rows.jsonl:94#3edba74a82bb", "row rows.jsonl:95#3edba74a82bb"),
        ("row rows.jsonl:94#3edba74a82bb", "row rows.jsonl:94#3edba74a82bc"),
        ("row rows.jsonl:94#381742950123", "row rows.jsonl:94#381742950124"),
        ("loss nan", "loss 3.1"),
    ],
)
def test_everything_else_counts(old: str, new: str) -> None:
    assert len(casebook.differences([old], [new])) == 1


def test_a_line_too_few_or_too_many_counts() -> None:
    assert len(casebook.differences([LINE], [])) == 1
    assert len(casebook.differences([], [LINE])) == 1


def test_an_update_changes_the_transcript_alone() -> None:
    content = TEXTS["zero_row_norm"]
    page = PAGES["zero_row_norm"]
    changed = casebook.updated(content, page.command, ["one", "", "two"])
    assert casebook.read("zero_row_norm", changed).transcript == ("one", "", "two")
    assert casebook.updated(changed, page.command, page.transcript) == content


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("<!--", "<!-"), "front matter"),
        (lambda text: text.replace("```console", "```sh"), "console block"),
        (lambda text: text.replace("class: W\n", ""), "needs codes, class, case"),
    ],
)
def test_a_page_that_is_not_whole_is_refused(change, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        casebook.read("page", change(TEXTS["zero_row_norm"]))


@pytest.mark.parametrize("language", LANGUAGES)
def test_explain_leads_to_the_page(language: str, capsys: pytest.CaptureFixture[str]) -> None:
    for code in ("NUM404", "NUM001"):
        assert main(["explain", code, "--lang", language]) == 0
        name = casebook.page_of(code)
        assert name is not None
        assert casebook.path_of(name) in capsys.readouterr().out
