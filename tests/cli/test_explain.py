"""``finitune explain``: a page for every code, in both languages."""

from __future__ import annotations

import pytest

from finitune.core.codes import PREFIXES, all_codes


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_code_has_a_page(cli, language):
    for code in all_codes().values():
        ran = cli("explain", code.code, "--lang", language)
        assert ran.code == 0
        assert ran.out.startswith(f"{code.code} {code.text(language).title}")
        assert all(cure in ran.out for cure in code.text(language).cures)


def test_a_code_in_any_case(cli):
    assert cli("explain", "cfg005").out == cli("explain", "CFG005").out


def test_the_list_holds_every_code_under_its_group(cli):
    ran = cli("explain")
    assert all(code in ran.out for code in all_codes())
    headings = [line[:3] for line in ran.out.splitlines() if line[3:5] == ": "]
    assert headings == [p for p in PREFIXES if any(c.startswith(p) for c in all_codes())]
    assert len(cli("explain", "--json").record["codes"]) == len(all_codes())


def test_json_page(cli):
    page = cli("explain", "CFG005", "--json").record["code"]
    assert (page["code"], page["severity"], page["title"]) == ("CFG005", "error", "unknown key")
    assert page["cures"]


def test_a_member_adds_its_docstring(cli):
    assert "What it sees:" in cli("explain", "NUM001").out
    assert "What it sees:" in cli("explain", "NUM400", "--json").record["code"]["notes"]
    assert cli("explain", "CFG005", "--json").record["code"]["notes"] is None


@pytest.mark.parametrize("name", ["CFG05", "CGF005", "005", "\0", "NUM", "x" * 500])
def test_an_unknown_code(cli, name):
    ran = cli("explain", name)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("CFG062")


def test_a_close_code_is_offered(cli):
    assert "CFG005" in cli("explain", "CFG05").err


def test_a_code_with_a_case_leads_to_it(cli):
    page = cli("explain", "NUM404").out
    assert "tests/casebook/exp_under_mask.md" in page
    assert "finitune bench --filter exp_under_mask --seeds 1 --tell" in page
    case = cli("explain", "NUM404", "--json").record["code"]["case"]
    assert case == {
        "page": "tests/casebook/exp_under_mask.md",
        "command": "finitune bench --filter exp_under_mask --seeds 1 --tell",
    }


def test_a_symptom_leads_to_the_index(cli):
    assert cli("explain", "NUM001", "--json").record["code"]["case"] == {"page": "tests/casebook/README.md"}


def test_a_code_without_a_case_says_none(cli):
    assert cli("explain", "CFG005", "--json").record["code"]["case"] is None
    assert "casebook" not in cli("explain", "CFG005").out
