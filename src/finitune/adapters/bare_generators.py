"""States of the global random generators as JSON, and back without trust.

Needed where a step is computed again in another process: a capsule, a script that was killed. Blocks of bytes that
several micro-batches share (Python's and numpy's generators hardly ever move) are stored once.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from finitune.numerics.seeds import GeneratorStates, generators_kept

_WORDS = 624
"""Of the state of a Mersenne Twister; its place in it is a number from 0 to this."""
_TWISTER = "MT19937"
_MAX_STATES = 4096
FAULTS = (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError, struct.error)
"""What :func:`unpack` raises for a record that is none."""


def pack(states: Sequence[GeneratorStates]) -> dict[str, Any]:
    """JSON-able; floats survive exactly."""
    blobs: dict[str, str] = {}
    return {"states": [_packed(s, blobs) for s in states], "blobs": blobs}


def _packed(state: GeneratorStates, blobs: dict[str, str]) -> dict[str, Any]:
    version, words, gauss = state.python
    return {
        "torch": _put(state.torch_cpu.cpu().numpy().tobytes(), blobs),
        "devices": [_put(d.cpu().numpy().tobytes(), blobs) for d in state.devices],
        "python": {"version": version, "words": _put(struct.pack(f"<{len(words)}I", *words), blobs), "gauss": gauss},
        "numpy": _packed_numpy(state.numpy, blobs),
    }


def _packed_numpy(state: Mapping[str, Any], blobs: dict[str, str]) -> dict[str, Any] | None:
    """None for another generator than numpy's usual one."""
    if state["bit_generator"] != _TWISTER:
        return None
    words = np.asarray(state["state"]["key"], dtype="<u4").tobytes()
    gauss = {"has_gauss": int(state["has_gauss"]), "gauss": float(state["gauss"])}
    return {"words": _put(words, blobs), "pos": int(state["state"]["pos"]), **gauss}


def _put(content: bytes, blobs: dict[str, str]) -> str:
    name = hashlib.sha256(content).hexdigest()[:16]
    blobs.setdefault(name, base64.b64encode(content).decode())
    return name


def unpack(record: Any) -> tuple[GeneratorStates, ...]:
    """Inverse of :func:`pack`, for this machine: accelerators that are not here, or not in use, are left out.

    Raises one of :data:`FAULTS` for what is no state of these generators.
    """
    now, states = GeneratorStates.now(), record["states"]
    if len(states) > _MAX_STATES:
        raise ValueError(f"{len(states)} states of generators")
    blobs = {str(name): base64.b64decode(content, validate=True) for name, content in record["blobs"].items()}
    found = tuple(_unpacked(state, blobs, now) for state in states)
    with generators_kept():  # what the generators refuse is found out here, before anything is computed
        for state in found:
            state.restore()
    return found


def _unpacked(record: Mapping[str, Any], blobs: Mapping[str, bytes], now: GeneratorStates) -> GeneratorStates:
    devices = [_tensor(blobs[name]) for name in record["devices"]][: len(now.devices)]
    if any(len(d) != len(n) for d, n in zip(devices, now.devices, strict=False)):
        devices = []
    cpu = _tensor(blobs[record["torch"]])
    if len(cpu) != len(now.torch_cpu):
        raise ValueError(f"a state of torch's generator of {len(cpu)} bytes, expected {len(now.torch_cpu)}")
    state = replace(now, torch_cpu=cpu, python=_python(record["python"], blobs))
    if len(devices) == len(now.devices):
        state = replace(state, devices=tuple(devices))
    if record["numpy"] is not None and now.numpy["bit_generator"] == _TWISTER:
        state = replace(state, numpy=_numpy(record["numpy"], blobs))
    return state


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _python(record: Mapping[str, Any], blobs: Mapping[str, bytes]) -> tuple[Any, ...]:
    words = struct.unpack(f"<{_WORDS + 1}I", blobs[record["words"]])
    gauss = record["gauss"]
    return (int(record["version"]), words, None if gauss is None else float(gauss))


def _numpy(record: Mapping[str, Any], blobs: Mapping[str, bytes]) -> dict[str, Any]:
    """Numpy itself does not look whether the place is inside of the state."""
    words = np.frombuffer(blobs[record["words"]], dtype="<u4").astype(np.uint32)
    pos = int(record["pos"])
    if words.shape != (_WORDS,) or not 0 <= pos <= _WORDS:
        raise ValueError(f"a state of numpy's generator of {words.size} words at {pos}")
    inner = {"key": words, "pos": pos}
    gauss = {"has_gauss": int(bool(record["has_gauss"])), "gauss": float(record["gauss"])}
    return {"bit_generator": _TWISTER, "state": inner, **gauss}
