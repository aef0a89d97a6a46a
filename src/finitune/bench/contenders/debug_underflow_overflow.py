"""``transformers.debug_utils.DebugUnderflowOverflow``: hooks that stop the run at the first NaN or inf going forward.

Meant for: finding the module whose activations overflow, while debugging.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload

MEANT_FOR = "finding the module whose activations overflow, while debugging"
# A frame begins with the module's dotted name and its class, indented, without numbers.
_FRAME = re.compile(r"^ {8,}([\w.]+) (\w+)$")


class DebugScript(Script):
    """The plain loop; what the hooks print is read when they stop the run."""

    def __init__(self, load: Workload, witness: Witness) -> None:
        from transformers.debug_utils import DebugUnderflowOverflow

        super().__init__(load, witness)
        self.printed = io.StringIO()
        self.debug: Any = DebugUnderflowOverflow(load.model)  # type: ignore[no-untyped-call]

    def one(self, batch: object) -> tuple[bool, float]:
        """One optimizer step."""
        try:
            with contextlib.redirect_stdout(self.printed):
                return super().one(batch)
        except ValueError as error:
            frames = [m.group(1) for m in map(_FRAME.match, self.printed.getvalue().splitlines()) if m]
            where = (("module", frames[-1]), ("parameter", f"{frames[-1]}.weight")) if frames else ()
            self.witness.find("", where, str(error).splitlines()[0])
            raise


def missing() -> str | None:
    """Always there."""
    return None


def drive(load: Workload, witness: Witness) -> None:
    """Train until something overflows; its hooks, which would stop the held-out loss as well, go afterwards."""
    before = {module: set(module._forward_hooks) for module in load.model.modules()}
    DebugScript(load, witness).run()
    for module, kept in before.items():
        for number in set(module._forward_hooks) - kept:
            del module._forward_hooks[number]
