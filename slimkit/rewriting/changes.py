"""The changes that rewrites are made of: plain records, applied in place to what a function built.

An artifact holds them, so that the user's model function gives the rewritten module again. Each
kind is a dataclass with `apply_`, which needs no inputs and draws nothing from the weights but
their shapes and order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from slimkit.errors import ArtifactError
from slimkit.evaluating import evaluating
from slimkit.pruning.removal import fit_attributes_, forget_gradient_shape_, tensors_by_name
from slimkit.rewriting.frames import OwnCalls
from slimkit.rewriting.replacements import REPLACEMENTS

NEW = -1
"""Where a layout has a channel of zeros that the tensor had not."""


@dataclass(frozen=True)
class Swap:
    """A module becomes one of torch.nn, wherever the model holds it.

    Args:
        path: of the module.
        becomes: the class in torch.nn.
        options: what it is made with.
    """

    path: str
    becomes: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.path} became nn.{self.becomes}"

    def apply_(self, model: nn.Module) -> None:
        """Put the new module in every place of the old."""
        old = _module(model, self.path)
        new = getattr(nn, self.becomes)(**self.options).train(old.training)
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is old:
                    parent._modules[name] = new


@dataclass(frozen=True)
class Removal:
    """A module leaves its nn.Sequential; the names of the others stay.

    Args:
        path: of the module.
    """

    path: str

    def __str__(self) -> str:
        return f"{self.path} is gone"

    def apply_(self, model: nn.Module) -> None:
        """Take the module out of its parent."""
        gone = _module(model, self.path)
        children = _module(model, self.path.rpartition(".")[0])._modules
        for name in [name for name, child in children.items() if child is gone]:
            del children[name]


@dataclass(frozen=True)
class Calls:
    """Operations that a module's own forward calls become others.

    Args:
        path: of the module; empty for the model itself.
        becomes: operation to a name in `slimkit.rewriting.replacements.REPLACEMENTS`.
        count: how many calls of them a forward makes.
    """

    path: str
    becomes: Mapping[str, str]
    count: int

    def __str__(self) -> str:
        named = [(op, name) for op, name in self.becomes.items() if name != "noted"]
        what = "; ".join(f"{op} became {name}" for op, name in named)
        return f"{self.path or 'the forward'}: {what} ({self.count} times)"

    def apply_(self, model: nn.Module) -> None:
        """Replace the calls in the module's forward."""
        unknown = [name for name in self.becomes.values() if name not in REPLACEMENTS]
        if unknown:
            raise ArtifactError(f"this slimkit has no replacement {unknown[0]!r}; use a newer one")
        OwnCalls.of(_module(model, self.path)).becomes |= self.becomes


@dataclass(frozen=True)
class Focus:
    """A convolution reads the image itself, not slices of it as channels.

    Args:
        path: of the convolution.
        owner: of the module whose forward slices; empty for the model itself.
        source: the first operation that reads the image there, as ``getitem:0``.
        end: the one that gives what the convolution reads, as ``cat:0``.
        block: rows and columns that become channels of one position.
        order: for each channel that the convolution read: channel, row and column in the block.
    """

    path: str
    owner: str
    source: str
    end: str
    block: int
    order: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        return f"{self.path} reads the image with a {self.block} times larger kernel and stride"

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Spread the kernel over the image and let the slices pass."""
        conv = _module(model, self.path)
        assert isinstance(conv, nn.Conv2d)
        weight, b = conv.weight.data, self.block  # (out, block block channels, *kernel)
        out, inputs, *kernel = weight.shape
        if inputs != len(self.order):
            raise ArtifactError(
                f"{self.path} reads {inputs} channels, but {len(self.order)} when it was rewritten"
            )
        channels = inputs // b**2
        spread = weight.new_zeros(out, channels, *(b * k for k in kernel))
        for k, (channel, row, column) in enumerate(self.order):
            spread[:, channel, row::b, column::b] = weight[:, k]
        _resize_(conv.weight, spread)
        conv.in_channels = channels
        conv.kernel_size = tuple(b * k for k in conv.kernel_size)
        conv.stride = tuple(b * s for s in conv.stride)
        assert not isinstance(conv.padding, str)
        conv.padding = tuple(b * p for p in conv.padding)
        OwnCalls.of(_module(model, self.owner)).passes[self.end] = self.source


@dataclass(frozen=True)
class Padding:
    """Tensors get further channels of zeros.

    Args:
        group: the first layer that makes the channels.
        channels: how many there were and are.
        layouts: tensor path -> dimension -> the position in the old tensor, or `NEW`, of each.
        attributes: whole numbers in the user's modules that follow: path -> name -> number.
    """

    group: str
    channels: tuple[int, int]
    layouts: Mapping[str, Mapping[int, tuple[int, ...]]]
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.group}: {self.channels[0]} channels became {self.channels[1]}"

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Lay the tensors out anew and bring the layers' attributes in line."""
        tensors = tensors_by_name(model)
        done: set[tuple[int, int]] = set()  # tied tensors have several names
        for path, dims in self.layouts.items():
            if path not in tensors:
                raise ArtifactError(f"the model has no tensor {path!r}; was it built differently?")
            for dim, layout in dims.items():
                tensor = tensors[path]
                if (id(tensor), dim) in done:
                    continue
                done.add((id(tensor), dim))
                new = _laid_out(tensor.data, dim, layout)
                if path.endswith("running_var"):
                    new[torch.tensor(layout) == NEW] = 1.0  # which batch-norm divides by
                _resize_(tensor, new)
        for module in model.modules():
            fit_attributes_(module)
        for path, numbers in self.attributes.items():
            for name, number in numbers.items():
                setattr(_module(model, path), name, number)


@dataclass(frozen=True)
class Plain:
    """A tensor that was computed of others for each forward becomes a parameter.

    Args:
        path: of the module; empty for the model itself.
        name: of the tensor.
    """

    path: str
    name: str

    def __str__(self) -> str:
        return f"{f'{self.path}.{self.name}'.lstrip('.')} became a plain parameter"

    def apply_(self, model: nn.Module) -> None:
        """Compute it once, as evaluation does, and forget how."""
        module = _module(model, self.path)
        remove = computed_tensors(module).get(self.name)
        if remove is None:
            raise ArtifactError(
                f"{self.path}.{self.name} is computed of nothing; was the model built differently?"
            )
        with evaluating(module):  # spectral_norm takes steps in training
            remove()


def computed_tensors(module: nn.Module) -> dict[str, Callable[[], None]]:
    """Tensors of a module that PyTorch computes anew, and what makes each of them plain."""
    found: dict[str, Callable[[], None]] = {}
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            found[name] = partial(_leave_parametrization_, module, name)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            found[hook.name] = partial(_leave_hook_, module, hook)
    return found


@torch.no_grad()
def _leave_parametrization_(module: nn.Module, name: str) -> None:
    """PyTorch's own way takes the property from the class, which copies of the module share."""
    parts = module.parametrizations
    assert isinstance(parts, nn.ModuleDict)
    value = getattr(module, name).clone()
    learns = any(p.requires_grad for p in parts[name].parameters())
    del parts[name]
    made, (plain, *_) = type(module), type(module).__bases__
    if len(parts):
        left = {key: item for key, item in vars(made).items() if key != name}
        module.__class__ = type(made.__name__, (plain,), left)
    else:
        del module.parametrizations
        module.__class__ = plain
    module.register_parameter(name, nn.Parameter(value, learns))


@torch.no_grad()
def _leave_hook_(module: nn.Module, hook: WeightNorm | SpectralNorm) -> None:
    given = getattr(module, f"{hook.name}_{'g' if isinstance(hook, WeightNorm) else 'orig'}")
    learns = given.requires_grad
    if isinstance(hook, WeightNorm):
        remove_weight_norm(module, hook.name)
    else:
        remove_spectral_norm(module, hook.name)
    getattr(module, hook.name).requires_grad_(learns)
    kept = module._load_state_dict_pre_hooks  # which PyTorch wraps, and then does not know again
    for key, found in list(kept.items()):
        about = getattr(found, "hook", found)
        if isinstance(about, SpectralNormLoadStateDictPreHook) and about.fn.name == hook.name:
            del kept[key]


Change = Swap | Removal | Calls | Focus | Padding | Plain
_KINDS: Mapping[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Swap, Removal, Calls, Focus, Padding, Plain)
}


def apply_(model: nn.Module, changes: Iterable[Change]) -> None:
    """Apply changes in order, in place.

    Raises:
        ArtifactError: the model lacks what one of them names.
    """
    for change in changes:
        change.apply_(model)


def written(change: Change) -> dict[str, Any]:
    """The change as plain data."""
    return {"kind": type(change).__name__.lower(), **asdict(change)}


def read(saved: Mapping[str, Any]) -> Change:
    """The change that `written`, and JSON, made plain.

    Raises:
        ArtifactError: a newer slimkit wrote it.
    """
    fields = {name: value for name, value in saved.items() if name != "kind"}
    if saved["kind"] not in _KINDS:
        raise ArtifactError(f"this slimkit knows no change {saved['kind']!r}; use a newer one")
    if saved["kind"] == "focus":
        fields["order"] = tuple(tuple(place) for place in fields["order"])
    if saved["kind"] == "padding":
        fields["channels"] = tuple(fields["channels"])
        fields["layouts"] = {
            path: {int(dim): tuple(layout) for dim, layout in dims.items()}
            for path, dims in fields["layouts"].items()
        }
    change: Change = _KINDS[saved["kind"]](**fields)
    return change


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ArtifactError(
            f"the model has no module {path!r}, which was rewritten; was it built differently?"
        ) from error


def _laid_out(tensor: Tensor, dim: int, layout: tuple[int, ...]) -> Tensor:
    positions = torch.tensor(layout, device=tensor.device)
    new = tensor.index_select(dim, positions.clamp(min=0))
    return new.index_fill(dim, (positions == NEW).nonzero().flatten(), 0)


def _resize_(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer, which stays the same object, data of another shape."""
    tensor.grad = None
    if tensor.requires_grad:
        forget_gradient_shape_(tensor)
    tensor.data = data
