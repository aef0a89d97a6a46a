"""The start of a run as a place to start a redo from: built again from the recipe, which gives the same bits."""

from __future__ import annotations

from finitune.engine.port import Port
from finitune.train.prepare import prepare
from finitune.train.recipe import Recipe


class Origin:
    """The state before the first step. Needs the memory of a second model while it is used."""

    step = 0
    attempt = 0

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def intact(self) -> bool:
        """It is made anew each time."""
        return True

    def restore(self, port: Port) -> None:
        """Make it the training state. Raises UserError where the model's files are gone."""
        fresh = prepare(self._recipe, looked_at=False).port
        port.restore(dict(fresh.state_tensors()), fresh.state_record())
