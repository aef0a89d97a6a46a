"""The rows experiment: evidence and suspects."""

from __future__ import annotations

import torch

from finitune.core.incident import Evidence, Result, Trigger
from finitune.core.types import RowId
from finitune.engine.experiments import rows
from finitune.engine.localise import localise
from support.replay_port import lab_of, row_id, with_case
from support.tiny_ports import llama_port, names, of_kind


def test_one_row_and_its_token_are_named_and_the_rest_is_good() -> None:
    port = llama_port(rows=4, width=16, micros=2)
    port.batches[0][1]["input_ids"][3, 9] = 5
    with torch.no_grad():
        port.model.model.embed_tokens.weight[5] = float("inf")
    lab = lab_of(port)
    evidence, suspects = rows.run(lab, lab.case)
    assert evidence.result is Result.GOOD
    assert evidence.numbers["rows"] == [str(row_id(1, 1, 3))]
    assert (evidence.numbers["num_units"], evidence.numbers["num_bad"], evidence.numbers["rest_good"]) == (8, 1, True)
    assert evidence.replays == lab.budget.replays
    assert names(suspects, "row") == names(suspects, "tokens") == [str(row_id(1, 1, 3))]
    assert of_kind(suspects, "tokens")[0].data == {
        "micro": 1, "index": 3, "by": "rows", "num_in_unit": 1, "span": [9, 10],
    }  # fmt: skip
    assert RowId.parse(suspects[0].name) == row_id(1, 1, 3)


def test_what_the_localisation_named_is_confirmed_at_little_cost() -> None:
    port = llama_port(rows=4, width=16, micros=2)
    port.batches[0][1]["input_ids"][3, 9:12] = 5
    with torch.no_grad():
        port.model.model.embed_tokens.weight[5] = float("inf")
    lab = lab_of(port)
    case = with_case(lab, suspects=localise(lab, lab.case))
    evidence, suspects = rows.run(lab, case)
    assert evidence.result is Result.GOOD
    assert of_kind(suspects, "tokens")[0].data["span"] == [9, 12]
    assert evidence.replays <= 4


def test_a_pack_is_named_with_all_its_rows() -> None:
    port = llama_port(rows=4)
    port.rows_per_unit = 2
    port.batches[0][0]["input_ids"][1, 3] = 5
    with torch.no_grad():
        port.model.model.embed_tokens.weight[5] = float("nan")
    lab = lab_of(port)
    _, suspects = rows.run(lab, lab.case)
    assert names(suspects, "row") == [str(row_id(1, 0, 1, k)) for k in range(2)]


def test_bad_weights_accuse_no_row() -> None:
    port = llama_port(rows=4)
    with torch.no_grad():
        port.model.lm_head.weight[0] = float("nan")
    lab = lab_of(port)
    evidence, suspects = rows.run(lab, lab.case)
    assert evidence.result is Result.BAD
    assert evidence.numbers["every"]
    assert suspects == ()


def test_it_leaves_no_trace() -> None:
    port = llama_port(rows=4)
    port.batches[0][0]["labels"][:] = -100
    lab = lab_of(port)
    state = torch.get_rng_state()
    rows.run(lab, lab.case)
    assert lab_of(port).before.mark.digest == lab.before.mark.digest
    assert all(p.grad is None for p in port.model.parameters())
    assert torch.get_rng_state().shape == state.shape


def test_it_is_wanted_where_the_step_fails_and_other_batches_do_not() -> None:
    case = lab_of(llama_port()).case
    assert rows.wanted(case)
    assert rows.wanted(case.with_evidence(Evidence("known_good_batch", Result.BAD, {"num_good": 1})))
    assert not rows.wanted(case.with_evidence(Evidence("known_good_batch", Result.BAD, {"num_good": 0})))
    assert not rows.wanted(case.with_evidence(Evidence("supervised_tokens", Result.BAD)))
    assert not rows.wanted(lab_of(llama_port(), Trigger.RUNAWAY).case)


def test_both_sentences_can_be_said() -> None:
    port = llama_port(rows=4)
    port.batches[0][0]["labels"][:] = -100
    lab = lab_of(port)
    evidence, _ = rows.run(lab, lab.case)
    for words in rows.SAYS.values():
        assert "{" not in words.say(evidence.numbers)
