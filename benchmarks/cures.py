"""Cure by cause: what a fault costs in held-out loss, against the clean run on the same batches.

    python benchmarks/cures.py [--seeds N] [--fault WORD]

clean   the run without the fault: no guard, fp32, a sane learning rate
ours    FiniTune with its guard, policy auto
plain, skip, halve, HF   see cures_peers.py

Every fault is a function of the data, of the state or of the recipe (cures_faults.py); where and when it strikes is
drawn from the seed. The controls have no fault: there the guarded run must be the unguarded one, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, machine, quiet
from cures_faults import CONTROLS, FAULTS, Fault
from cures_peers import SCRIPTS, Peer, hf, script
from cures_runs import Ran, Setting, clean, ours
from finitune.core.journal import encode

CONTENDERS = ("ours", *SCRIPTS, "HF")
TARGET_PERCENT = 1.0
_NOTES = (
    "Held-out loss against the clean run in %, computed in fp32 from the final weights; nan: weights not finite. "
    "In brackets: tensors with a non-finite element, of 21.",
    "plain: AdamW and clipping. skip: clip, and skip the update if loss or norm is not finite. halve: on such a step "
    "the weights of 10 steps before, and half the learning rate for good. HF: transformers.Trainer, its defaults.",
    "The learning rates are 3 or 6 (too high) and 0.3 or 1 (a hundred times), the clean one 0.003; both start from "
    "a model that was trained for 100 steps, and warm up over 40.",
    "Tiny InternLM2 (hidden 32, 2 layers) in fp32, 239 rows, 130 steps of 4 rows (masked row: 260 steps of 1); fp16 is "
    "emulated: same roundings, same overflows.",
)


def measured(fault: Fault, seed: int, home: Path) -> dict[str, Any]:
    """One fault under one seed, all contenders."""
    setting = Setting(fault, seed, home)
    truth, own = clean(setting), ours(setting)
    peers: dict[str, Peer] = {name: script(setting, name) for name in SCRIPTS} | {"HF": hf(setting)}
    losses = {"ours": own.loss, **{name: peer.loss for name, peer in peers.items()}}
    bad = {"ours": own.bad, **{name: peer.bad for name, peer in peers.items()}}
    return {
        "fault": fault.name,
        "seed": seed,
        "planted": own.planted.says.replace(f"{home}/", ""),
        "clean": truth.loss,
        "percent": {name: 100 * (loss / truth.loss - 1) for name, loss in losses.items()},
        "bad": bad,
        "notes": {name: peer.note for name, peer in peers.items() if peer.note},
        "status": own.status,
        "incidents": [{**i, "where": str(i["where"]).replace(f"{home}/", "")} for i in own.story],
        "right place": right_place(own),
        "within": 100 * (own.loss / truth.loss - 1) <= TARGET_PERCENT,
        "not worse than skip": not own.loss > losses["skip"] * (1 + TARGET_PERCENT / 100),
    }


def right_place(own: Ran) -> bool | None:
    """Whether every place that was named is one where the fault was put; None where none was or none was named."""
    named = [i["where"] for i in own.story if i["where"]]
    return all(place in own.planted.where for place in named) if named and own.planted.where else None


def control(fault: Fault, seed: int, home: Path, *extra: str) -> dict[str, Any]:
    """A run without a fault, with and without the guard."""
    setting = Setting(fault, seed, home, extra)
    guarded, bare = ours(setting), ours(setting, "bare", "guard.enabled=false")
    return {
        "control": fault.name,
        "seed": seed,
        "planted": guarded.planted.says.replace(f"{home}/", ""),
        "bit-identical": same_bits(guarded, bare),
        "incidents": guarded.story,
        "held-out loss": guarded.loss,
    }


def same_bits(one: Ran, other: Ran) -> bool:
    """The same weights, bit for bit."""
    return all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: what each contender was left with, and how ours got there."""
    head = ("fault", "seed", *CONTENDERS, "ours: step, code, where -> remedy (replays; steps lost)")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["fault"], str(row["seed"]), *(_percent(row, name) for name in CONTENDERS), _story(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _percent(row: dict[str, Any], name: str) -> str:
    if name in row["notes"]:
        return "-"
    value, bad = row["percent"][name], row["bad"][name]
    shown = f"{value:+.2f}" if math.isfinite(value) else "nan"
    return f"{shown} [{bad}]" if bad else shown


def _story(row: dict[str, Any]) -> str:
    told = [
        f"{i['step']}: {i['code']} {i['where']} -> {i['remedy']} ({i['replays']:.0f}; {i['steps lost']})"
        for i in row["incidents"]
    ]
    return "; ".join(told) or "no incident"


def controls_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines of the controls."""
    lines = ["| control | seed | bit-identical to unguarded | incidents |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['control']} | {row['seed']} | {row['bit-identical']} | {_story(row)} |")
    return lines


def write(rows: list[dict[str, Any]], controls: list[dict[str, Any]], time_s: float) -> None:
    """The tables on the screen and, with what they were measured on, under ``results/``."""
    whys = sorted({f"HF has no entry for {r['fault']}: {n}." for r in rows for n in r["notes"].values()})
    text = ["# Cure by cause", "", *table(rows), "", *controls_table(controls), ""]
    for note in (*_NOTES, *whys):
        text += [note, ""]
    print("\n".join(text))
    sys.stdout.flush()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cures.md").write_text("\n".join(text), encoding="utf-8")
    record = {
        "name": "cures",
        "date": time.strftime("%Y-%m-%d"),
        "time_s": round(time_s),
        "machine": machine(),
        "rows": rows,
        "controls": controls,
        "notes": [*_NOTES, *whys],
    }
    path = RESULTS / "cures.json"
    path.write_text(json.dumps(encode(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """All faults and controls under every seed."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--seeds", type=int, default=2)
    asked.add_argument("--fault", default="", help="only what has this word in its name; nothing is kept")
    given = asked.parse_args()
    quiet()
    started_s = time.perf_counter()
    rows: list[dict[str, Any]] = []
    controls: list[dict[str, Any]] = []
    for fault in (*FAULTS, *CONTROLS):
        for seed in range(given.seeds if given.fault in fault.name else 0):
            with tempfile.TemporaryDirectory() as home:
                into, measure = (controls, control) if fault in CONTROLS else (rows, measured)
                into.append(measure(fault, seed, Path(home)))
                print(fault.name, seed, f"{time.perf_counter() - started_s:.0f} s", file=sys.stderr)
    if given.fault:
        print("\n".join([*table(rows), "", *controls_table(controls)]))
        return
    write(rows, controls, time.perf_counter() - started_s)


if __name__ == "__main__":
    main()
