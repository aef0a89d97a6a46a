"""Counter-based seeding: the randomness of a step is a pure function of where the step stands."""

from __future__ import annotations

import hashlib
import struct

import torch


def seed_of(run_seed: int, step: int, micro_batch: int = 0, rank: int = 0, stream: str = "train") -> int:
    """A 63-bit seed from (run seed, step, micro-batch, rank) by BLAKE2b.

    Neighbouring counters give unrelated seeds, so no step's randomness depends on whether another
    step was run, skipped or repeated. ``stream`` separates uses (training, sampling, data order).
    """
    packed = struct.pack("<qqqq", run_seed, step, micro_batch, rank) + stream.encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_torch(run_seed: int, step: int, micro_batch: int = 0, rank: int = 0) -> None:
    """Seed torch's global generators (all devices) for one micro-batch."""
    torch.manual_seed(seed_of(run_seed, step, micro_batch, rank))
