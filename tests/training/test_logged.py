"""What a step logs outside of a loop goes where it is wanted, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
from lit import Batches, Lit

from slimkit.training.logged import logged


def test_blocks_nest_and_end():
    """A criterion's scores may be computed while a scan measures the same module's loss."""
    module = Lit()
    outer: list[str] = []
    inner: list[str] = []
    with logged(module, lambda name, _value: outer.append(name)):
        module.log("a", 1.0)
        with logged(module, lambda name, _value: inner.append(name)):
            module.log_dict({"b": 1.0, "c": torch.ones(())})
        module.log("d", 1.0)
    assert outer == ["a", "d"]
    assert inner == ["b", "c"]
    assert "log" not in vars(module)


def test_a_failed_step_leaves_the_module_as_it_was():
    """The trainer must get what the module logs afterwards."""
    module = Lit()
    batch: Any = next(iter(Batches().train_dataloader()))
    try:
        with logged(module, lambda _name, _value: None):
            module.training_step(batch[:1], 0)
    except ValueError:
        pass
    else:
        raise AssertionError("a batch without labels should fail")
    assert "log" not in vars(module)
