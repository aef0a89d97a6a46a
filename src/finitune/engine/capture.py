"""Capture: what is needed to compute the failing step again elsewhere. References and plain values, no copies.

The port stands at the state before the step. What is drawn at random in a step is seeded by its number, which is in the
state's record; the states of the global generators are named by a digest, so that a difference can be seen.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finitune.core.incident import Trigger
from finitune.core.types import Reading
from finitune.engine.case import Case
from finitune.engine.monitor import read
from finitune.engine.port import ReplayPort, Unit
from finitune.numerics.fingerprint import Fingerprint, fingerprint
from finitune.numerics.seeds import GeneratorStates, generators_kept


@dataclass(frozen=True, slots=True)
class Captured:
    """One step, ready to be put into a capsule."""

    step: int
    """1-based number of the step at hand."""
    micros: tuple[Any, ...]
    """Its micro-batches (nests of tensors) as the model gets them."""
    units: tuple[Unit, ...]
    """Rows by micro-batch and place."""
    record: Mapping[str, Any]
    """The state that is not tensors: counters, cursor, scaler, statistics, conditions."""
    state: Fingerprint
    """Of weights, moments and record before the step."""
    frozen: Fingerprint
    """Of weights and buffers that are not trained."""
    expected: Reading
    """What the step at hand comes to."""
    case: Case
    kernels: Mapping[str, Any]
    generators: Mapping[str, str]
    """Digests of the global generators' states."""
    versions: Mapping[str, str]
    width_tokens: int
    """Padding width: the longest second dimension of the batch's tensors."""


def capture(port: ReplayPort, case: Case, mark: Fingerprint | None = None) -> Captured:
    """Everything about the step at hand; the port stays as it is.

    ``mark``: the fingerprint of the present state, where it is known already (saves a pass over the weights).

    Raises NotPossible where the port cannot give the batch.
    """
    record = port.state_record()
    step = int(record["step"]) + 1
    micros = tuple(port.batch())
    expected = case.reading if case.reading.step == step else _computed(port)
    return Captured(
        step=step,
        micros=micros,
        units=tuple(port.units()),
        record=record,
        state=mark or fingerprint(port.state_tensors(), record),
        frozen=fingerprint(sorted(frozen_tensors(port).items()), {}),
        expected=expected,
        case=case,
        kernels=kernels_in_use(case.facts),
        generators=generator_digests(),
        versions=versions_of(case.facts),
        width_tokens=max((t.shape[1] for t in tensors_of(micros) if t.dim() > 1), default=0),
    )


def _computed(port: ReplayPort) -> Reading:
    """A failure of several steps has been committed: the step at hand is the one after it, and is computed once."""
    with generators_kept():
        try:
            return read(port.forward_backward())
        finally:
            port.abort()


def is_of_one_step(trigger: Trigger) -> bool:
    """Whether the step at hand shows the failure by itself."""
    return trigger not in (Trigger.RUNAWAY, Trigger.SILENT, Trigger.FORECAST)


def frozen_tensors(port: ReplayPort) -> dict[str, torch.Tensor]:
    """Weights and buffers of the model that are not part of the training state."""
    trained = {id(p) for _, p in port.parameters()}
    named = {**dict(port.model.named_parameters()), **dict(port.model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if id(tensor) not in trained}


def kernels_in_use(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Which kernels torch may choose from: attention, determinism, product precision, threads."""
    sdp = torch.backends.cuda
    return {
        "attention": facts.get("attention"),
        "sdp_flash": sdp.flash_sdp_enabled(),
        "sdp_memory_efficient": sdp.mem_efficient_sdp_enabled(),
        "sdp_math": sdp.math_sdp_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "threads": torch.get_num_threads(),
    }


def generator_digests() -> dict[str, str]:
    """A short digest of each global generator's state."""
    states = GeneratorStates.now()
    named: dict[str, Any] = {"torch": states.torch_cpu.numpy().tobytes(), "python": repr(states.python).encode()}
    named["numpy"] = repr(sorted(states.numpy["state"].items(), key=str)).encode()
    for number, state in enumerate(states.devices):
        named[f"device{number}"] = state.cpu().numpy().tobytes()
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in named.items()}


def versions_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """What computes the step."""
    given = facts.get("versions")
    named = {str(k): str(v) for k, v in given.items()} if isinstance(given, Mapping) else {}
    return {"torch": torch.__version__, **named, "python": platform.python_version(), "machine": platform.machine()}


def tensors_of(nest: Any) -> list[torch.Tensor]:
    """All tensors of a nest of mappings and sequences, in order."""
    if isinstance(nest, torch.Tensor):
        return [nest]
    parts = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
