"""Capsules: written whole, read back, replayed to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from finitune.core.incident import Incident, Trigger
from finitune.engine.capsule import CapsuleOptions, incident_folder, write_capsule
from finitune.engine.capsule_nest import BadNest, pack, unpack
from finitune.engine.capsule_read import read_capsule
from finitune.engine.capsule_replay import Replay, replay_with, state_of
from finitune.engine.capsule_tensors import read_tensors, write_tensors
from finitune.engine.capture import capture
from finitune.engine.conditions import NotPossible
from finitune.numerics.fingerprint import fingerprint
from support.capsules import failing, spoilt_weight


@pytest.fixture(autouse=True)
def _quick_plan(monkeypatch):
    from finitune.train import plan

    monkeypatch.setattr(plan, "measured_flops", lambda *_args, **_kw: 1e9)


@pytest.fixture(scope="module")
def outlier(tmp_path_factory):
    return failing(tmp_path_factory.mktemp("outlier"))


def mark(port):
    return fingerprint(port.state_tensors(), port.state_record()).digest


# ---- tensors ----


def test_tensors_are_plain_safetensors_both_ways(tmp_path):
    made = {
        "a/b": torch.randn(3, 4),
        "half": torch.tensor([65504.0, float("inf"), -0.0]).half(),
        "bf": torch.randn(2, 1, 5).bfloat16(),
        "ids": torch.arange(7),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    write_tensors(tmp_path / "ours.safetensors", made)
    theirs = load_file(tmp_path / "ours.safetensors")
    save_file(made, tmp_path / "theirs.safetensors")
    ours = read_tensors(tmp_path / "theirs.safetensors")
    for name, tensor in made.items():
        for found in (theirs[name], ours[name], read_tensors(tmp_path / "ours.safetensors")[name]):
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert found.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist() if tensor.dim() else True
            assert torch.equal(found, tensor)


def test_a_view_and_a_transposed_tensor_are_stored_by_value(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "t", {"t": whole.T, "v": whole[1:, ::2]})
    found = read_tensors(tmp_path / "t")
    assert torch.equal(found["t"], whole.T)
    assert torch.equal(found["v"], whole[1:, ::2])


def test_a_complex_tensor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        write_tensors(tmp_path / "t", {"t": torch.zeros(2, dtype=torch.complex64)})


# ---- nests ----


def test_a_nest_comes_back_as_it_was():
    nest = {"x": torch.arange(3), 1: [torch.zeros(2), (None, True, 2, "text", float("nan"))], "1": torch.ones(1)}
    tensors: dict = {}
    back = unpack(json.loads(json.dumps(pack(nest, "b", tensors))), tensors)
    assert list(back) == ["x", 1, "1"]
    assert torch.equal(back["x"], nest["x"])
    assert torch.equal(back["1"], nest["1"])
    assert back[1][1][:4] == (None, True, 2, "text")
    assert back[1][1][4] != back[1][1][4]


def test_left_out_rows_leave_no_content_behind():
    tensors: dict = {}
    packed = pack({"ids": torch.full((2, 9), 4711), "text": "secret words"}, "b", tensors, keep=False)
    assert tensors == {}
    assert "4711" not in json.dumps(packed)
    assert "secret" not in json.dumps(packed)
    assert "[2, 9]" in json.dumps(packed)


@pytest.mark.parametrize("nest", [object(), {"x": {1, 2}}, {(1, 2): torch.zeros(1)}, [[[]]] and {"f": print}])
def test_what_is_no_nest_is_said(nest):
    with pytest.raises(NotPossible):
        pack(nest, "b", {})


def test_a_bottomless_nest_is_refused():
    nest: list = []
    nest.append(nest)
    with pytest.raises(NotPossible, match="deep"):
        pack(nest, "b", {})


@pytest.mark.parametrize("record", [3, {}, {"tensor": "absent"}, {"map": [1]}, {"map": [[[], {}]]}, {"list": {}}])
def test_what_is_no_packed_nest_is_refused(record):
    with pytest.raises(BadNest):
        unpack(record, {})


# ---- capture ----


def test_capture_changes_nothing_and_copies_nothing(outlier):
    before, generator = mark(outlier.port), torch.get_rng_state()
    captured = capture(outlier.port, outlier.case)
    assert mark(outlier.port) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for _, p in outlier.port.parameters())
    assert captured.step == 3
    assert captured.expected == outlier.case.reading
    assert captured.width_tokens == outlier.case.facts["width_tokens"]
    assert [r for u in captured.units for r in u.rows] == list(outlier.port.rows())
    assert captured.state.digest == before
    assert captured.kernels["threads"] == torch.get_num_threads()
    assert set(captured.generators) >= {"torch", "python", "numpy"}
    assert captured.versions["torch"] == torch.__version__


def test_a_failure_of_many_steps_is_captured_with_what_the_next_step_comes_to(outlier):
    case = replace(outlier.case, trigger=Trigger.RUNAWAY, reading=replace(outlier.case.reading, step=2, loss=9.0))
    captured = capture(outlier.port, case)
    assert captured.step == 3
    assert captured.expected.loss == outlier.case.reading.loss


# ---- written and replayed ----


def replayed(path, **options):
    from finitune.train.replay_capsule import replay_capsule

    return replay_capsule(str(path), **options)


@pytest.mark.parametrize("weights", ["full", "lora", "auto"])
def test_a_finite_failure_replays_to_the_same_bits(outlier, weights):
    before = mark(outlier.port)
    path = outlier.written(weights=weights)
    assert mark(outlier.port) == before
    done = replayed(path.parent)
    assert done.verdict is Replay.BITS, done.reason
    assert done.now["loss"] == outlier.case.reading.loss
    assert done.notes == ()


def test_the_data_set_is_not_needed(tmp_path):
    made = failing(tmp_path)
    path = made.written()
    (tmp_path / "rows.jsonl").unlink()
    assert replayed(path).verdict is Replay.BITS


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora={r: 2, lora_dropout: 0.3}", "gradient_accumulation_steps=2"),
        ("data.packing=true", "model.attn_implementation=eager"),
        ("precision=fp16-emulated", "data.packing=true"),
        ("optim=sgd",),
    ],
)
def test_other_runs_replay_to_the_same_bits(tmp_path, overrides):
    done = replayed(failing(tmp_path, *overrides).written())
    assert done.verdict is Replay.BITS, done


def test_a_delta_capsule_holds_the_rows_that_changed_and_replays(tmp_path):
    from finitune.train.facts import resolved
    from finitune.train.keep_capsule import base_tensors

    made = failing(tmp_path, "weight_decay=0.0")
    recipe = resolved(made.prepared.recipe, made.prepared)
    path = made.written(weights="delta", base=lambda: base_tensors(recipe))
    capsule = read_capsule(path)
    assert capsule.delta, "rows of the embedding that no batch held are as they began"
    fresh = base_tensors(recipe)
    whole = state_of(capsule, fresh)
    assert all(torch.equal(whole[n], t) for n, t in made.port.state_tensors())
    assert replayed(path).verdict is Replay.BITS


def test_a_delta_without_a_base_is_refused_and_nothing_is_written(outlier, tmp_path):
    captured = capture(outlier.port, outlier.case)
    with pytest.raises(NotPossible):
        write_capsule(tmp_path, captured, outlier.port, outlier.incident, CapsuleOptions(weights="delta"))
    assert list(tmp_path.iterdir()) == []


def test_a_nan_in_a_weight_replays_and_a_mended_capsule_no_longer_does(tmp_path):
    made = failing(tmp_path, spoil=spoilt_weight)
    assert replayed(made.written("a")).verdict is Replay.BITS
    made.port.parameters()[3][1].detach().view(-1)[5] = 0.1
    done = replayed(made.written("b"))
    assert done.verdict is Replay.GONE
    assert done.recorded["loss"] != done.recorded["loss"]
    assert done.now["loss"] == done.now["loss"]


def test_a_broken_frozen_weight_goes_into_a_capsule_without_the_base(tmp_path):
    def spoil(port):
        next(p for p in port.model.parameters() if not p.requires_grad and p.dim() == 2).view(-1)[3] = float("inf")

    made = failing(tmp_path, "lora={r: 2}", spoil=spoil)
    path = made.written(weights="lora")
    assert [n for n in read_capsule(path).tensors if n.startswith("frozen/")]
    done = replayed(path)
    assert done.verdict is Replay.BITS, done
    assert done.notes == ()


def test_other_numbers_of_the_same_failure_reproduce_with_other_bits(outlier):
    made = replace(outlier, case=replace(outlier.case, reading=replace(outlier.case.reading, loss=1234.0)))
    assert replayed(made.written("other")).verdict is Replay.SAME


def test_rows_can_be_left_out(outlier):
    path = outlier.written("ids", rows="ids")
    ids = set(outlier.port.batch()[0]["ids_BT"].view(-1).tolist())
    capsule = read_capsule(path)
    assert capsule.micros is None
    assert [u.rows for u in capsule.units] == [u.rows for u in outlier.port.units()]
    stored = load_file(path / "tensors.safetensors")
    assert not [n for n in stored if n.startswith("batch")]
    assert not any(t.dtype is torch.int64 and ids & set(t.view(-1).tolist()) for t in stored.values())
    done = replayed(path)
    assert done.verdict is Replay.IMPOSSIBLE
    assert "rows" in done.reason


def test_a_digest_capsule_is_small_and_says_what_is_missing(outlier):
    path = outlier.written("digest", weights="digest", checkpoint="checkpoint-2")
    assert (path / "tensors.safetensors").stat().st_size < 20_000
    done = replayed(path)
    assert done.verdict is Replay.IMPOSSIBLE
    assert "weights" in done.reason
    assert read_capsule(path).info["checkpoint"] == "checkpoint-2"


def test_large_weights_are_left_out_by_default(outlier):
    assert read_capsule(outlier.written("large", limit_bytes=1000)).weights == "digest"


def test_a_capsule_of_a_script_asks_for_the_users_own_model(outlier):
    done = replayed(outlier.written("script", recipe=None))
    assert done.verdict is Replay.IMPOSSIBLE
    assert "finitune.replay(" in done.reason


def test_a_model_that_is_not_here_is_said(outlier):
    recipe = outlier.recipe.replace("name_or_path: tiny-llama", "name_or_path: /no/such/model")
    assert recipe != outlier.recipe
    done = replayed(outlier.written("elsewhere", recipe=recipe))
    assert done.verdict is Replay.IMPOSSIBLE
    assert "/no/such/model" in done.reason


def test_another_model_of_that_name_is_said(outlier):
    recipe = outlier.recipe.replace("name_or_path: tiny-llama", 'name_or_path: "tiny-llama:layers=1"')
    assert recipe != outlier.recipe
    done = replayed(outlier.written("smaller", recipe=recipe))
    assert done.verdict is Replay.IMPOSSIBLE


def test_an_experiment_and_another_precision_are_told(outlier):
    path = outlier.written("experiment")
    done = replayed(path, experiment="supervised_tokens")
    assert done.verdict is Replay.BITS
    assert done.evidence.experiment == "supervised_tokens"
    assert done.said
    assert "fp32" in replayed(path, precision="fp32").said


def test_the_incident_lies_beside_its_capsule(outlier):
    folder = outlier.written("beside").parent
    assert folder == incident_folder(outlier.home / "beside", 1)
    record = json.loads((folder / "incident.json").read_text())
    assert Incident.from_json(record).step == 3


@pytest.mark.parametrize("options", [{"rows": "some"}, {"weights": "all"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match="no such capsule"):
        CapsuleOptions(**options)


def test_a_port_of_the_users_own_replays_a_capsule_without_a_recipe(outlier):
    path = outlier.written("own", recipe=None)

    def port_of(capsule):
        from finitune.train.replay_capsule import port_of as build

        return build(replace(capsule, recipe=outlier.recipe))

    assert replay_with(path, port_of).verdict is Replay.BITS


def test_a_port_that_cannot_be_made_is_a_verdict(outlier):
    def port_of(_capsule):
        raise NotPossible("no such model here")

    done = replay_with(outlier.written("none", recipe=None), port_of)
    assert (done.verdict, done.reason) == (Replay.IMPOSSIBLE, "no such model here")
    assert replay_with(outlier.written("none", rows="ids"), port_of).reason != done.reason
