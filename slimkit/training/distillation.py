"""The teacher and what the student learns from it, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.batches import inputs_of
from slimkit.errors import PluginError, SlimkitError, did_you_mean
from slimkit.interfaces import DistillationLoss
from slimkit.recipe import Distill
from slimkit.registry import blame, discover
from slimkit.training.copies import own_copy


class Distillation:
    """Compares student and teacher at the places that the recipe names.

    Tensors are caught by forward hooks during the student's own training step, so any
    LightningModule works; the teacher then runs on the same inputs, without gradients.

    Args:
        student: the network being trained.
        recipe: the distill section.
    """

    def __init__(self, student: nn.Module, recipe: Distill) -> None:
        self.student = student
        self.recipe = recipe
        self.teacher = _frozen_copy(student)
        self.losses: list[DistillationLoss] = []
        for entry in recipe.losses:
            self.losses.append(discover().create("loss", entry.name, entry.options))
            for network, place in zip((student, self.teacher), entry.places, strict=True):
                names = [name for name, _ in network.named_modules() if name]
                if place != "output" and place not in names:
                    raise SlimkitError(
                        f"distill: loss {entry.name!r}: the model has no module {place!r}"
                        + did_you_mean(place, names)
                    )

    @contextmanager
    def watching(self) -> Iterator[Catch]:
        """Inside, what the student's forward takes and gives is caught."""
        catch = Catch()
        places = [loss.places[0] for loss in self.recipe.losses]
        handles = _hook(self.student, places, catch)
        try:
            yield catch
        finally:
            for handle in handles:
                handle.remove()

    def losses_of(self, caught: Catch, batch: Any) -> dict[str, Tensor]:
        """Each loss, weighted: name to scalar.

        Raises:
            PluginError: a loss is not a finite scalar or has no gradient to the student.
            SlimkitError: a place gives no single tensor.
        """
        if not caught.called:  # the training step went round the forward: run it once more
            with self.watching() as caught:
                self.student(*inputs_of(batch, self.student))
        parameter = next(self.student.parameters(), None)
        if parameter is not None:
            self.teacher.to(parameter.device)  # costs nothing once it is there
        taught = Catch()
        handles = _hook(self.teacher, [loss.places[1] for loss in self.recipe.losses], taught)
        try:
            with torch.no_grad():
                self.teacher(*caught.args, **caught.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        result = {}
        for entry, loss in zip(self.recipe.losses, self.losses, strict=True):
            mine = _tensor(caught.tensors, entry.places[0], "student")
            theirs = _tensor(taught.tensors, entry.places[1], "teacher").detach()
            plugin = discover().find("loss", entry.name)
            with blame(plugin, f"comparing student and teacher at {entry.at}"):
                value = loss(mine, theirs)
            if not isinstance(value, Tensor) or value.dim() != 0:
                raise PluginError(f"{plugin} must return a scalar tensor, not {value!r}")
            if not value.requires_grad and mine.requires_grad:
                raise PluginError(f"{plugin} returned a loss without gradient to the student")
            result[f"{entry.name}@{'/'.join(dict.fromkeys(entry.places))}"] = entry.weight * value
        return result


class Catch:
    """What one forward took and gave."""

    def __init__(self) -> None:
        self.called = False
        self.args: tuple[Any, ...] = ()
        self.kwargs: Mapping[str, Any] = {}
        self.tensors: dict[str, Any] = {}


def _hook(network: nn.Module, places: list[str], catch: Catch) -> list[Any]:
    def entered(_module: nn.Module, args: Any, kwargs: Any) -> None:
        catch.called, catch.args, catch.kwargs = True, args, kwargs

    def left(place: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            catch.tensors[place] = output

        return keep

    handles: list[Any] = [network.register_forward_pre_hook(entered, with_kwargs=True)]
    for place in dict.fromkeys(places):
        target = network if place == "output" else network.get_submodule(place)
        handles.append(target.register_forward_hook(left(place)))
    return handles


def _tensor(tensors: Mapping[str, Any], place: str, who: str) -> Tensor:
    value = tensors.get(place)
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Tensor):
        return value[0]
    raise SlimkitError(
        f"distill: at {place!r} the {who} gives {type(value).__name__}, not a tensor; name another "
        "module with at:"
    )


def _frozen_copy(network: nn.Module) -> nn.Module:
    teacher = own_copy(network).eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher
