"""The script's own scaler: its bits in a healthy run, and a floor and a ceiling where conditions set them."""

from __future__ import annotations

import torch

from finitune.adapters.bare_scale import Scaling
from finitune.engine.conditions import AS_CONFIGURED, Conditions

LOW = Conditions(max_scale=1024.0)


def trained(scaling: Scaling, conditions: Conditions) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.5)
    scaling.scaled((weight * torch.arange(3.0)).sum(), conditions).backward()
    scaling.unscale(optimizer, conditions)
    scaling.step(optimizer, conditions)
    return weight


def test_a_ceiling_is_what_the_loss_is_multiplied_by_and_backed_off_from() -> None:
    scaling = Scaling(torch.amp.GradScaler("cpu", init_scale=2.0**60))
    assert scaling.scale(AS_CONFIGURED) == 2.0**60
    assert scaling.scale(LOW) == 1024.0
    assert scaling.left(LOW)
    assert not scaling.left(Conditions(max_scale=2.0**-4))
    scaling.overflowed(LOW)
    assert scaling.record() == {"scale": 512.0, "tracker": 0}


def test_the_floor_is_above_the_ceiling() -> None:
    scaling = Scaling(torch.amp.GradScaler("cpu"))
    assert scaling.scale(Conditions(max_scale=2.0**-9)) == 2.0**-4
    assert scaling.scale(Conditions(max_scale=2.0**-9, min_scale=2.0**-9)) == 2.0**-9


def test_a_scaler_that_was_never_used_takes_the_ceiling_with_its_first_update_and_keeps_it() -> None:
    scaling = Scaling(torch.amp.GradScaler("cpu", init_scale=2.0**120))
    weight = trained(scaling, LOW)
    assert weight.tolist() == [1.0, 0.5, 0.0]
    assert scaling.scale(AS_CONFIGURED) == 1024.0
    assert scaling.record() == {"scale": 1024.0, "tracker": 1}


def test_without_conditions_the_scaler_has_its_own_bits() -> None:
    own = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trained(Scaling(own), AS_CONFIGURED)
    assert (own.get_scale(), own.state_dict()["_growth_tracker"]) == (2.0**10, 1)
