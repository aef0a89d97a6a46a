"""K: an old log-probability far too low at a padded position, and exp of the difference is infinite under the mask.

The engine that made the roll-out fills up with a low number, or pads elsewhere than the trainer does. The ratio
exp(log pi - log pi_old) is inf there; the mask comes after it, and inf x 0 is NaN, in the loss or only in its gradient.
Threads: MakazhanAlpamys/Soup#342, jingyaogong/minimind#365.
"""

from __future__ import annotations

from functools import partial
from random import Random

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import first_step, found, in_micro, width_of
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "K"
CASES = (23,)
RUNS = (("policy_gradient", "fp32"), ("policy_gradient", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """One or more padded positions of one row get a log-probability of -120 to -10^5."""
    step, row = _padded(load, random)
    micro, index = in_micro(load, step, row)
    name = load.rows[step - 1][row]
    real = int(micro["attention_mask"][index].sum())
    # Position t of a log-probability is that of token t + 1.
    spots = range(real - 1, micro["input_ids"].shape[1] - 1)
    chosen = sorted(random.sample(spots, random.randint(1, len(spots))))
    value = -log_uniform(random, 120, 1e5)
    steps = [at for at, _ in found(load, name)]
    for at, place in found(load, name):
        fill = partial(_fill, load, (at, place), [t for t in chosen if t < width_of(load, at) - 1], value)
        fill() if at == 1 else load.between(at - 1, fill)
    return Expected(
        says=f"old log-probabilities of row {name} are {value:.0f} at padded positions {chosen}, at steps {steps}",
        step=first_step(load, name),
        codes=("NUM404",),
        places=(("row", name),),
        remedies=("skip_rows", "drop_batch"),
        never=("OPT", "SYS", "MOD", "NUM400", "NUM401"),
        data={"row": name, "value": value, "positions": chosen},
    )


def _padded(load: Workload, random: Random) -> tuple[int, int]:
    """A row with padding, drawn until one has some."""
    while True:
        step, row = load.place(random)
        micro, index = in_micro(load, step, row)
        if not bool(micro["attention_mask"][index].all()):
            return step, row


def _fill(load: Workload, where: tuple[int, int], positions: list[int], value: float) -> None:
    """After the roll-out of these steps has been noted."""
    micro, index = in_micro(load, *where)
    micro["old_logps"][index, positions] = value
