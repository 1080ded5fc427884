"""What a plugin implements. Plugins see tensors; slimkit owns the model, the loop and the files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from slimkit.errors import QuantizationError
from slimkit.grid import Grid

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = [
    "Activation",
    "Backend",
    "Criterion",
    "Deployable",
    "DistillationLoss",
    "Grid",
    "Layer",
    "Quantizer",
    "Scheme",
    "TimedRunner",
]


@dataclass(frozen=True)
class Activation:
    """What a layer's output channels were like on data, behind its batch-norm and its activation.

    Args:
        mean: mean absolute value of each channel over samples and positions, shape (out,).
        zeros: fraction of its values that are zero or below, shape (out,).
    """

    mean: Tensor
    zeros: Tensor


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer, as a criterion sees them.

    What is optional is there if the criterion's `needs` names it.

    Args:
        name: dotted path of the weight in the model, such as ``layer1.0.conv1.weight``.
        weight: shape (out, in / groups, *kernel), or (out, in) of a linear layer; detached.
        gradient: loss gradient of the weight, same shape, of one batch.
        norm_scale: gamma of the batch-norm that follows, shape (out,).
        fisher: mean over samples of the squared gradient of each sample's loss, the weight's shape.
        input_norm: root of the sum of squares of each input feature over samples and positions;
            broadcasts to the weight, as (1, in, 1, 1) does, or (out, in / groups, 1, 1).
        activation: what the layer's output was like.
    """

    name: str
    weight: Tensor
    gradient: Tensor | None = None
    norm_scale: Tensor | None = None
    fisher: Tensor | None = None
    input_norm: Tensor | None = None
    activation: Activation | None = None


class Criterion(ABC):
    """Scores weights by importance; slimkit removes what scores least.

    Options are keyword-only arguments of the constructor, typed and with defaults.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Which optional fields of `Layer` must be filled.

    A criterion that needs gradients is scored once a batch and the scores are averaged. A layer
    that has no such thing (no batch-norm behind it, say) is not shown to the criterion.
    """

    @abstractmethod
    def score(self, layer: Layer) -> Tensor:
        """Importance of each weight, in any unit, at least 0; small is removed first.

        Must broadcast to ``layer.weight``. A score of each weight is summed over each channel, both
        in the layers that make it and in those that read it; (out, 1, 1, 1) is the score of output
        channels and says nothing of inputs. slimkit adds up the scores of all layers that are
        coupled. Must not change the layer and must give the same scores for the same tensors.
        """


class Quantizer(nn.Module, ABC):
    """Chooses the range of one tensor and rounds to it.

    A subclass keeps what it has seen in buffers, so that ranges are saved with the model. Further
    options are keyword-only arguments of its constructor, typed and with defaults.

    A range may be learned: then it stands in parameters, which `observe` sets and the optimizer
    changes. Training adds them to the optimizer once ranges are known. A weight is shown to a
    quantizer with parameters once, in front of its first rounding; any other is blanked and sees
    it at every forward.

    Args:
        grid: the integers to round to; ``grid.channels`` is the number of scales.
    """

    follows_batches: ClassVar[bool] = False
    """Whether the size and order of the batches may change the range, as in a moving average."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take one tensor of any shape into account (per channel: along ``grid.axis``).

        One without values changes nothing.
        """

    @abstractmethod
    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32, positive) and zero point (int32), each of shape (channels,)."""

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`: equals ``grid.dequantize(grid.quantize(x))`` with `qparams`.

        Gradients pass straight through where nothing is clipped; a learned range gets its own.
        """
        return self.grid.fake_quantize(x, *self.qparams())


class DistillationLoss(nn.Module):
    """Measures how far the student is from the teacher.

    Options are keyword-only arguments of the constructor, typed and with defaults. A loss may own
    parameters (a projection): the student's optimizer trains them, and checkpoints hold them.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """What else `forward` is given, as a keyword argument: ``labels``, the batch's own."""

    places: ClassVar[int] = 1
    """How many places are compared at once. From 2 on, `student` and `teacher` are tuples."""

    student_channels: ClassVar[Mapping[str, int]] = {}
    """Parameters that run over the student's channels at the first place: dotted name to dimension.

    When channels of the student are cut out, these are cut in step, and so is the optimizer's
    state of them.
    """

    teacher_channels: ClassVar[Mapping[str, int]] = {}
    """The same of the teacher's channels, for a teacher that is an average of the student and is
    cut with it."""

    def prepare(self, student: Tensor, teacher: Tensor) -> None:
        """Make the parameters whose shapes follow from the tensors; the default makes none.

        Called once before the first `forward`, with tensors as `forward` gets them. A resumed run
        calls it with zeros of the shapes that the student has by then.

        Raises:
            ValueError: these shapes cannot be compared.
        """

    compares_samples: ClassVar[bool] = False
    """Whether samples of a batch are compared with each other: then the loss of a batch that holds
    each of them twice may be another."""

    when_equal: ClassVar[Literal["zero", "least", "any"]] = "zero"
    """What it is where the student equals the teacher: zero, its least value, or neither."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar, at least 0, averaged over the batch (dimension 0).

        Gradients must reach `student`; `teacher` arrives detached. While channels are pruned,
        those of `student` may be masked: all zero. Compute in float32 whatever the inputs are.

        Raises:
            ValueError: these shapes cannot be compared.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Scheme:
    """The integer arithmetic of a backend: slimkit puts fake-quantizers exactly there.

    Args:
        activations: grid of activations.
        weights: grid of weights.
        operations: names of the operations that compute on integers, as torch.nn.functional or
            Tensor calls them: ``conv2d``, ``linear``, ``add``, ``mul``, ``cat``, ``mean`` ...
        placement: ``inputs``: every input of such an operation is rounded in front of it and its
            output is float. ``tensors``: every tensor that enters or leaves one is rounded once,
            where it is made, and later readers share it.
        keeps: operations that pass integers on unchanged (max pooling, reshapes); only with
            ``tensors``.
        fuses: operations that the runtime merges into the integer operation in front of them
            (relu); rounding then happens behind them.
        steps: operations that the runtime computes in two integer steps with a rounding between
            them, as `slimkit.quantization.sites.STEPS` says (silu); only with ``tensors``.
        float_outputs: whether an integer operation may give float to readers that compute in
            float; else what it makes is always rounded. Only with ``tensors``.
        rounds_outputs: whether what an integer operation makes is rounded also where it leaves the
            model; else that is float. Only with ``tensors``, and without `float_outputs`.
        prescribed: operations whose output has one grid whatever the data, as the runtime
            computes them with a table: (operation, scale, zero point). Those of `steps` take the
            grid of the operation inside them. Only with ``tensors``.
        tables: functions of one tensor that the runtime looks up among integers where what they
            read and what they make is rounded for others; nothing is rounded for their sake, so
            schemes that differ in it alone are equal.
        depthwise: whether convolutions of one input channel a group compute on integers as well.
        arithmetic: how a convolution or linear layer turns its sums of integers into its output,
            so that slimkit can follow it to the last bit (`slimkit.quantization.exact`).
            ``requantize``: the 32-bit sum, bias included, as float32 times input scale * weight
            scale / output scale, rounded half to even; what is rounded elsewhere is divided by its
            scale. ``dequantize``: the sum times one float32 scale plus the bias, rounded once to
            float32; what is rounded is multiplied by the reciprocal of its scale, half away from
            zero. ``fused``: the sum times one float32 scale, and then plus the bias, each rounded
            to float32; what layers make is rounded by one multiply-add with the reciprocal of its
            scale, half to even. ``reciprocal``: as ``requantize``, but what is rounded elsewhere
            is multiplied by the reciprocal of its scale, and sums and products of two tensors
            are of integers, as XNNPACK computes them. ``unknown``: not to the last bit.
        bias_bits: 32 where the bias is an integer too, of scale input * weight; None where float.
    """

    activations: Grid
    weights: Grid
    operations: frozenset[str]
    placement: Literal["inputs", "tensors"] = "inputs"
    keeps: frozenset[str] = frozenset()
    fuses: frozenset[str] = frozenset()
    steps: frozenset[str] = frozenset()
    float_outputs: bool = False
    bias_bits: int | None = None
    depthwise: bool = True
    arithmetic: Literal["unknown", "requantize", "dequantize", "fused", "reciprocal"] = "unknown"
    rounds_outputs: bool = False
    prescribed: tuple[tuple[str, float, int], ...] = ()
    tables: frozenset[str] = field(default=frozenset(), compare=False)

    def narrowed(self, weight_bits: int | None) -> Scheme:
        """The same with weights of fewer bits, which the backend stores and computes as its own.

        Raises:
            QuantizationError: the backend's weights are not as wide.
        """
        if weight_bits is None:
            return self
        if type(weight_bits) is not int or not 2 <= weight_bits <= self.weights.bits:
            raise QuantizationError(
                f"weights of {weight_bits} bits do not fit the {self.weights.bits} bits of the "
                f"backend's: choose weight_bits from 2 to {self.weights.bits}"
            )
        return replace(self, weights=replace(self.weights, bits=weight_bits))

    def holds(self, other: Scheme) -> bool:
        """Whether the backend computes what `other` says: the same, or narrower weights."""
        fits = other.weights.bits <= self.weights.bits
        return fits and self.narrowed(other.weights.bits) == other


@dataclass(frozen=True)
class Deployable:
    """A finished model, as a backend sees it.

    Args:
        program: the eval-mode model as a flat ATen graph. Batch-norm is folded. Where it is
            quantized, activations pass through a pair of
            ``quantized_decomposed.quantize_per_tensor`` and ``dequantize_per_tensor`` and each
            integer weight is a constant behind ``dequantize_per_channel`` or
            ``dequantize_per_tensor`` (int8, and int32 for an integer bias).
        example_inputs: what the program was traced with; shapes are fixed.
        quantized: whether it holds any integer operation.
    """

    program: ExportedProgram
    example_inputs: tuple[Tensor, ...]
    quantized: bool


Runner = Callable[..., Sequence[Tensor]]
"""Takes the model's input tensors, gives its output tensors flattened in order (CPU tensors)."""


@runtime_checkable
class TimedRunner(Protocol):
    """A `Runner` whose runs are timed where they happen: on a device that calls take time to reach.

    A backend's `load` may give one. slimkit then asks it for times instead of timing its calls.
    """

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """What every runner does."""

    def times(self, inputs: tuple[Tensor, ...], runs: int) -> list[float]:
        """Milliseconds of each of `runs` runs on `inputs`, one after the other, on the device."""


class Backend(ABC):
    """Compiles a finished model into files and runs them; slimkit measures.

    Options are keyword-only arguments of the constructor, typed and with defaults. Where an
    instance has them as attributes of the same names and JSON holds them, an artifact that it was
    given for keeps them, and its files are opened with them again.
    """

    scheme: ClassVar[Scheme]
    """What it can compute in integers."""

    channel_multiple: ClassVar[int] = 1
    """Channel counts that it computes at full speed are multiples of this; pruning keeps to it
    where the recipe has no ``round_to``."""

    float_variants: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Other precisions that its runtime offers for a float model, such as ``bf16``: name to the
    options of the constructor. The float file is compiled and measured with each as well, so that
    the report can say where one of them beats int8."""

    least_db: ClassVar[float] = 40.0
    """Signal to difference on the example, in decibels, below which a float file is refused: it
    computes something else than the model. Files in float32 keep over 100: say 80 there. Runtimes
    that keep 8 bits of each number want less."""

    def check(self, deployable: Deployable) -> list[str]:  # noqa: ARG002  (the default knows none)
        """What stands in the way, one sentence each; empty if `compile` will work."""
        return []

    def remarks(self, deployable: Deployable) -> list[str]:  # noqa: ARG002
        """What the files will run, but in float or slowly, one sentence each, with a remedy.

        `slimkit check --targets` says it beside what follows from `scheme` and `channel_multiple`.
        It is asked only where `check` found nothing.
        """
        return []

    def weight_bits(self) -> int | None:
        """How wide weights may be where the device sums products of the scheme's wrongly.

        x86 processors without VNNI add products of 8-bit integers in 16 bits by twos, which
        overflow; those of 7-bit weights do not. Weights are of so many bits where nobody asks for
        another width. Ask the runtime by a sum that would overflow. None: the scheme's are right.
        """
        return None

    def scheme_with(self, weight_bits: int | None) -> Scheme:
        """`scheme` with weights of so many bits; None: as `weight_bits` says, or else its own."""
        return self.scheme.narrowed(self.weight_bits() if weight_bits is None else weight_bits)

    @abstractmethod
    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write the device's files, and nothing else, into the existing empty `directory`."""

    @abstractmethod
    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Open the files of `directory` for inference on `threads` threads.

        The directory may be gone once this returns: read what you need.
        """

    def threads(self) -> int | None:
        """How many threads can compute at once on the device that `load` opens files on.

        None: as many as this process may use, since that is where they run.
        """
        return None

    def peak_bytes(self, directory: Path, inputs: tuple[Tensor, ...]) -> int | None:  # noqa: ARG002
        """Resident memory that opening and running the files on one thread adds on the device.

        It is added to a process there that has the runtime and no file. None: slimkit measures a
        process on this machine.
        """
        return None

    def operators(self, directory: Path) -> dict[str, int]:  # noqa: ARG002
        """How many operators of each type the runtime executes, as it names them.

        Integer ones carry ``int8`` or start with ``QLinear``, ``QGemm`` or ``MatMulInteger``.
        """
        return {}

    def profile(self, directory: Path, inputs: tuple[Tensor, ...]) -> dict[str, float]:  # noqa: ARG002
        """Milliseconds of one run on one thread that each type of `operators` takes, all together.

        Empty where the runtime does not tell. The names are those of `operators`.
        """
        return {}


def tensors_of(value: object) -> list[Tensor]:
    """All tensors in a nested output, in order: tuples, lists, dicts, sets, and plain objects."""
    return [*_tensors_in(value, set())]


def _tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, nn.Module | type):
            seen.add(id(leaf))
            inside = leaf if isinstance(leaf, set | frozenset) else _held_by(leaf)
            for part in inside:
                yield from _tensors_in(part, seen)


def _held_by(value: object) -> list[object]:
    """What a plain object holds (a dataclass of tensors, say)."""
    return [*getattr(value, "__dict__", {}).values()]
