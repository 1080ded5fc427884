"""What a pruned training cannot do is said before its first step, where it can be known."""

from __future__ import annotations

from typing import Any

import pytest
from lit import Lit, fit
from torch import Tensor

from slimkit import SlimModule
from slimkit.errors import PruningError


class Frozen(Lit):
    """Its first convolution is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.requires_grad_(False)


class Detached(Lit):
    """Its loss does not depend on the first convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[4:](self.net[:4](x).detach())


def section(criterion: str, **more: Any) -> dict[str, Any]:
    return {"prune": {"criterion": criterion, "target": {"flops": 0.5}, **more}}


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_frozen_weights_are_named_before_the_first_step(criterion: str) -> None:
    module = SlimModule(Frozen(), section(criterion))
    with pytest.raises(PruningError, match=r"net\.0\.weight is frozen \(requires_grad=False\)"):
        fit(module)
    assert module.trainer.global_step == 0


def test_single_weights_that_are_frozen_are_named_too() -> None:
    sparse = {"criterion": "taylor", "granularity": "element", "protect_first": False}
    module = SlimModule(Frozen(), {"prune": {**sparse, "target": {"ratio": 0.5}}})
    with pytest.raises(PruningError, match=r"net\.0\.weight is frozen"):
        fit(module)


@pytest.mark.parametrize("more", [{"protect": ["net.0"]}, {"criterion": "l1"}])
def test_the_way_out_that_it_names_works(more: dict[str, Any]) -> None:
    recipe = section("taylor")
    recipe["prune"] |= {"target": {"params": 0.9}, "round_to": 1, **more}
    module = SlimModule(Frozen(), recipe)
    fit(module, max_epochs=2)
    assert module.state.cut


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_a_loss_that_does_not_depend_on_a_layer_is_said(criterion: str) -> None:
    module = SlimModule(Detached(), section(criterion))
    with pytest.raises(PruningError, match=r"the loss gave net\.0\.weight none"):
        fit(module)
