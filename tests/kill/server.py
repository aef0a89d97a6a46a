"""The fork server: imports everything once, then forks a child for every run that is asked for.

It is a process of its own, not pytest's: that one may have run parallel regions or have threads from other tests,
and a fork of it could hang; and here one thread is certain (``OMP_NUM_THREADS=1``), whatever pytest was started with.

Requests and replies are JSON lines on standard input and output.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_HUNG_S = 60.0


def preload() -> None:
    """Import what every run needs, and have one thread for good. No tensor is computed here."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)

    import finitune.train.plan
    import finitune.train.run
    import kill.child
    import kill.configurations
    import kill.watching  # noqa: F401

    # A quarter of a second a run for the guess how long it will take: not what is tried here.
    finitune.train.plan.measured_flops = lambda *_: 1e10


def import_lazy(names: list[str]) -> None:
    """Import what a child has found to be needed late."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)


def warm_up(data: str) -> None:
    """Do here once what every child would do for the first time: a model, a forward pass, the tables behind them.

    No backward pass: torch refuses one in the fork of a process that has done one.
    """
    from finitune.train.evaluate import evaluate
    from finitune.train.prepare import prepare
    from kill.configurations import CONFIGURATIONS, recipe_of

    for name in CONFIGURATIONS:
        prepared = prepare(recipe_of(name, Path(data), Path(data) / "none"))
        evaluate(prepared.port.parts, prepared.eval_batches, 0)


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Fork a child for a request; send it the signals that the request asks for; wait for its end."""
    from kill.child import perform
    from kill.machine import trace

    reading, writing = os.pipe()
    waiting, starting = os.pipe()
    started_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        for descriptor in (reading, starting):
            os.close(descriptor)
        os.setsid()
        os.read(waiting, 1)
        reply = json.dumps(perform(request)).encode()
        while reply:
            reply = reply[os.write(writing, reply) :]
        os._exit(0)
    for descriptor in (writing, waiting):
        os.close(descriptor)
    tracer = trace(pid, request["trace"]) if request.get("trace") else None
    os.close(starting)
    text, hung = _wait(pid, reading, list(request.get("signals", ())), started_s)
    _, status = os.waitpid(pid, 0)
    if tracer is not None:
        tracer.wait()
    done = {"died": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "time_s": time.monotonic() - started_s}
    return {**(json.loads(text) if text.endswith(b"}") else {"status": "hung" if hung else "dead"}), **done}


def _wait(pid: int, reading: int, signals: list[tuple[float, int]], started_s: float) -> tuple[bytes, bool]:
    """What the child says until it ends; (its words, whether it hung and was killed)."""
    text, hung = b"", False
    signals = sorted((started_s + after_s, number) for after_s, number in signals)
    signals += [(started_s + _HUNG_S, signal.SIGUSR1), (started_s + _HUNG_S + 0.5, signal.SIGKILL)]
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, signals[0][0] - time.monotonic()) if signals else None)
        if ready:
            part = os.read(reading, 1 << 20)
            if not part:
                break
            text += part
        elif signals:
            _, number = signals.pop(0)
            hung = hung or number == signal.SIGUSR1
            os.kill(pid, number)
    os.close(reading)
    return text, hung


def requests() -> Iterator[dict[str, Any]]:
    """Requests until the client closes the pipe."""
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Serve."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    preload()
    for request in requests():
        if request["task"] == "import":
            import_lazy(request["modules"])
            warm_up(request["data"])
            gc.collect()
            gc.freeze()
            reply: dict[str, Any] = {"status": "imported"}
        else:
            reply = run(request)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
