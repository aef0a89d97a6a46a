"""``finitune chat``: which model is meant, one question, a conversation, and its ends."""

from __future__ import annotations

import builtins

import pytest

from finitune.cli import chat
from finitune.cli.chat import Talk, converse
from finitune.cli.places import model_of
from finitune.core.errors import UserError
from finitune.core.types import Finding, Severity

BAD = Finding("MOD033", Severity.ERROR, "logits")


class Speaker:
    """Answers with the number of messages it was given; "bad" fails, "stop" is interrupted."""

    def __init__(self) -> None:
        self.heard: list[list[dict[str, str]]] = []

    def __call__(self, messages):
        self.heard.append(list(messages))
        yield "I heard "
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        if messages[-1]["content"] == "bad":
            yield BAD
            return
        yield str(len(messages))


@pytest.fixture
def speaker(monkeypatch):
    stand_in = Speaker()
    monkeypatch.setattr(chat, "_speaker", lambda path, device, sampling: stand_in)
    return stand_in


def lines(*given):
    left = list(given)
    return lambda: left.pop(0) if left else None


def spoken(talk: Talk, *given: str) -> str:
    said: list[str] = []
    converse(talk, lines(*given), said.append)
    return "".join(said)


def test_a_conversation_remembers():
    speaker = Speaker()
    assert spoken(Talk(speaker, "be kind"), "hi", "  ", "again") == "I heard 2\nI heard 4\n"
    roles = [m["role"] for m in speaker.heard[-1]]
    assert roles == ["system", "user", "assistant", "user"]


def test_reset_forgets_all_but_the_system_message():
    speaker = Speaker()
    spoken(Talk(speaker, "be kind"), "hi", "/reset", "again")
    assert [m["content"] for m in speaker.heard[-1]] == ["be kind", "again"]


@pytest.mark.parametrize("leave", ["/exit", "/quit", " /exit "])
def test_exit_leaves(leave):
    speaker = Speaker()
    spoken(Talk(speaker), "hi", leave, "never")
    assert len(speaker.heard) == 1


def test_an_unknown_command_is_not_sent_to_the_model():
    speaker = Speaker()
    assert "/reset" in spoken(Talk(speaker), "/rest")
    assert speaker.heard == []


@pytest.mark.parametrize("prompt", ["bad", "stop"])
def test_an_answer_that_failed_or_was_stopped_is_not_remembered(prompt):
    speaker = Speaker()
    spoken(Talk(speaker), prompt, "hi")
    assert [m["content"] for m in speaker.heard[-1]] == ["hi"]


def test_one_question(cli, speaker):
    ran = cli("chat", "m", "--prompt", "hi")
    assert (ran.code, ran.out) == (0, "I heard 1\n")
    (turn,) = cli("chat", "m", "--prompt", "hi", "--json").record["turns"]
    assert (turn["prompt"], turn["answer"], turn["finding"]) == ("hi", "I heard 1", None)


def test_an_answer_with_a_finding_is_exit_code_1(cli, speaker):
    ran = cli("chat", "m", "--prompt", "bad")
    assert ran.code == 1
    assert "MOD033" in ran.out
    assert cli("chat", "m", "--prompt", "bad", "--json").record["turns"][0]["finding"]["code"] == "MOD033"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_of_input_and_ctrl_c_leave_cleanly(cli, speaker, monkeypatch, end):
    given = iter(["hi"])

    def read(_prompt=""):
        for line in given:
            return line
        raise end

    monkeypatch.setattr(builtins, "input", read)
    ran = cli("chat", "m")
    assert ran.code == 0
    assert "I heard 1" in ran.out
    assert ran.err == ""


def test_a_run_is_its_final_model_else_its_newest_checkpoint(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("")
    with pytest.raises(UserError) as caught:
        model_of(str(run))
    assert caught.value.code.code == "CFG065"
    for name, mark in (("checkpoint-9", "config.json"), ("checkpoint-10", "adapter_config.json")):
        (run / name).mkdir()
        (run / name / mark).write_text("{}")
    (run / "checkpoint-11").mkdir()
    (run / "checkpoint-tmp").mkdir()
    (run / "checkpoint-tmp" / "config.json").write_text("{}")
    assert model_of(str(run)) == str(run / "checkpoint-10")
    (run / "final").mkdir()
    (run / "final" / "config.json").write_text("{}")
    assert model_of(str(run)) == str(run / "final")


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "org/name", "no/such/folder", "x" * 5000, "a\0b"])
def test_any_other_name_stays_as_it_is(name):
    assert model_of(name) == name


def test_a_real_model_answers(cli):
    words = ["chat", "tiny-internlm2", "--prompt", "hi", "--max-new-tokens", "3", "--device", "cpu", "--json"]
    first, second = cli(*words).record["turns"], cli(*words).record["turns"]
    assert first[0]["answer"] == second[0]["answer"]
