"""Answers of the model while it trains; a model that cannot answer is a finding, not a crash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finitune.models.chat import generate
from finitune.numerics.seeds import seed_of
from finitune.train.observer import SampleEvent
from finitune.train.recipe import SampleSection
from finitune.train.step import Parts


@dataclass(frozen=True, slots=True)
class Sampler:
    """Asks the recipe's prompts; leaves weights, mode and random state as they were."""

    parts: Parts
    tokenizer: Any
    settings: SampleSection
    tell: Callable[[SampleEvent], None]

    def ask(self, step: int) -> None:
        """Ask every prompt once after ``step`` batches."""
        for index, prompt in enumerate(self.settings.prompts):
            with self.parts.context():
                answer = generate(
                    self.parts.model,
                    self.tokenizer,
                    [{"role": "user", "content": prompt}],
                    max_new_tokens=self.settings.max_new_tokens,
                    temperature=self.settings.temperature,
                    top_p=self.settings.top_p,
                    seed=seed_of(self.parts.seed, step, index, stream="sample"),
                    device=self.parts.strategy.device,
                )
            self.tell(SampleEvent(step, prompt, answer.text, answer.finding))
