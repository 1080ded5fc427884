"""Catches what modules of a network give during a forward that somebody else calls."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.errors import SlimkitError
from slimkit.evaluating import replaced
from slimkit.interfaces import tensors_of
from slimkit.places import Place, describe


class Catch:
    """What one forward took and gave; of several, the last, with gradients if any had them.

    Args:
        who: as messages call the network, such as ``the student``.
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self.called = False
        self.args: tuple[Any, ...] = ()
        self.kwargs: Mapping[str, Any] = {}
        self.learns = False  # whether gradients flow from what it gave
        self.given: dict[str, Any] = {}  # path of the module -> what it gave

    @property
    def is_passed_by(self) -> bool:
        """Whether a forward for a metric runs, behind the one that is learnt from."""
        return self.learns and not torch.is_grad_enabled()

    def is_behind(self, loss: Tensor) -> bool:
        """Whether gradients of `loss` flow to what the network gave."""
        wanted = {t.grad_fn for t in tensors_of(self.given[""]) if t.grad_fn is not None}
        left, seen = [loss.grad_fn], set[Any]()
        while left:
            node = left.pop()
            if node in wanted:
                return True
            if node is not None and node not in seen:
                seen.add(node)
                left.extend(before for before, _ in node.next_functions)
        return False

    def tensor(self, place: Place) -> Tensor:
        """What was given there; of a list of one, its only tensor.

        Raises:
            SlimkitError: the module did not run, or gave no single tensor there.
        """
        if place.module not in self.given:
            raise SlimkitError(
                f"at {place.text!r}, {self.who} computed nothing: its forward does not call "
                f"the module {place.module!r} (a list of modules is never called): name one that "
                "it calls"
            )
        try:
            value = place.pick(self.given[place.module])
        except SlimkitError as error:
            raise SlimkitError(f"at {place.text!r} of {self.who}: {error}") from error
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if not isinstance(value, Tensor):
            raise SlimkitError(
                f"at {place.text!r}, {self.who} gives {describe(value)}, not a tensor: name a part "
                "of it, such as output[0] or output.logits, or another module"
            )
        return value


def module_paths(network: nn.Module) -> list[str]:
    """The paths of all its modules, shared ones under each."""
    return [name for name, _ in network.named_modules(remove_duplicate=False) if name]


@contextmanager
def catching(network: nn.Module, places: Iterable[Place], who: str) -> Iterator[Catch]:
    """Inside, what `network` takes, and what its modules give at `places`, is caught."""
    catch = Catch(who)

    own = network.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if catch.is_passed_by:
            return output
        catch.called, catch.args, catch.kwargs = True, args, kwargs
        catch.given[""] = output
        catch.learns = any(t.requires_grad for t in tensors_of(output))
        return output

    def left(path: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if not catch.is_passed_by:
                catch.given[path] = output

        return keep

    handles = [
        network.get_submodule(path).register_forward_hook(left(path))
        for path in dict.fromkeys(place.module for place in places)
        if path
    ]
    try:
        with replaced(network, forward):
            yield catch
    finally:
        for handle in handles:
            handle.remove()
