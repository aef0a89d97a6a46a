"""Counter-based seeding: the randomness of a step is a pure function of where the step stands.

Three generators are global to a process and may be drawn from by a model's code: torch's (dropout; one on every
device), Python's ``random`` and numpy's (LayerDrop in some models). All of them are seeded before every micro-batch.
They belong to the host program, so whoever seeds them for a time gives their states back (:func:`generators_kept`).
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

_WORD = 2**32


def seed_of(run_seed: int, step: int, micro_batch: int = 0, rank: int = 0, stream: str = "train") -> int:
    """A 63-bit seed from (run seed, step, micro-batch, rank) by BLAKE2b.

    Neighbouring counters give unrelated seeds, so no step's randomness depends on whether another
    step was run, skipped or repeated. ``stream`` separates uses (training, sampling, data order).
    """
    packed = struct.pack("<qqqq", run_seed, step, micro_batch, rank) + stream.encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_generators(run_seed: int, step: int, micro_batch: int = 0, rank: int = 0, stream: str = "train") -> None:
    """Seed the global generators of torch, Python and numpy for one micro-batch."""
    seed_all(seed_of(run_seed, step, micro_batch, rank, stream))


def seed_all(seed: int) -> None:
    """Seed the global generators of torch (CPU, and the accelerator in use), Python and numpy; 0 <= seed < 2**63.

    ``torch.manual_seed`` would do the same for torch, but formats the call stack for every kind of accelerator
    that is not in use: hundreds of microseconds in a deep call.
    """
    torch.default_generator.manual_seed(seed)
    accelerator = _accelerator_in_use()
    if accelerator is not None:
        seed_device = getattr(accelerator, "manual_seed_all", None) or accelerator.manual_seed
        seed_device(seed)
    random.seed(seed)
    _seed_numpy(seed)


def _seed_numpy(seed: int) -> None:
    np.random.seed([seed % _WORD, seed // _WORD])
    if not isinstance(np.random.get_bit_generator(), np.random.MT19937):  # type: ignore[attr-defined]
        # Gaussians come in pairs; for other generators than its own, numpy keeps the second of a pair over a seeding.
        state: Any = np.random.get_state(legacy=False)
        np.random.set_state({**state, "has_gauss": 0, "gauss": 0.0})


def _accelerator_in_use() -> ModuleType | None:
    """The module of torch for the accelerator, such as ``torch.cuda``; None where nothing was computed on one yet."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module: ModuleType = torch.get_device_module(device)
    # A Mac's module has no such question: there, being available is being ready.
    ready = getattr(module, "is_initialized", torch.accelerator.is_available)
    return module if ready() else None


@dataclass(frozen=True, slots=True)
class GeneratorStates:
    """The states of all global generators at one moment."""

    torch_cpu: torch.Tensor
    devices: tuple[torch.Tensor, ...]
    """One for each accelerator; empty where none is in use."""
    python: tuple[Any, ...]
    numpy: dict[str, Any]

    @classmethod
    def now(cls) -> GeneratorStates:
        """Copies of the present states."""
        numpy_state: Any = np.random.get_state(legacy=False)
        return cls(torch.get_rng_state(), _device_states(), random.getstate(), numpy_state)

    def restore(self) -> None:
        """Put the states back. An accelerator first used since then keeps its state."""
        torch.set_rng_state(self.torch_cpu)
        accelerator = _accelerator_in_use() if self.devices else None
        if accelerator is not None:
            if hasattr(accelerator, "set_rng_state_all"):
                accelerator.set_rng_state_all(list(self.devices))
            else:
                accelerator.set_rng_state(self.devices[0])
        random.setstate(self.python)
        np.random.set_state(self.numpy)


def _device_states() -> tuple[torch.Tensor, ...]:
    accelerator = _accelerator_in_use()
    if accelerator is None:
        return ()
    if hasattr(accelerator, "get_rng_state_all"):
        return tuple(accelerator.get_rng_state_all())
    return (accelerator.get_rng_state(),)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is seeded or drawn inside, all global generators are afterwards as they were before."""
    states = GeneratorStates.now()
    try:
        yield
    finally:
        states.restore()


@contextmanager
def generators_seeded(seed: int) -> Iterator[None]:
    """Inside, all global generators are seeded by ``seed``; afterwards they are as they were before."""
    with generators_kept():
        seed_all(seed)
        yield
