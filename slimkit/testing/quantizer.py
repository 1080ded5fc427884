"""What a quantizer promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slimkit.errors import QuantizationError
from slimkit.interfaces import Grid, Quantizer, Scheme
from slimkit.quantization.calibration import calibrate_
from slimkit.quantization.fake import FakeQuantization
from slimkit.testing.promises import Promises, Subject

QUANTIZER = Promises()

GRIDS = {
    "signed symmetric": Grid(),
    "unsigned with a zero point": Grid(signed=False, symmetric=False),
    "4 bits, signed symmetric": Grid(bits=4),
    "a scale per output channel": Grid(per_channel=True, axis=0, channels=3),
    "a scale per channel of dimension 1": Grid(per_channel=True, axis=1, channels=4),
}
POWERS = {
    f"{kind}, scales that are powers of two": replace(grid, power_of_two=True)
    for kind, grid in GRIDS.items()
}
_SCHEME = Scheme(Grid(), Grid(per_channel=True), frozenset({"linear"}))


@dataclass(frozen=True)
class GridCase:
    """One grid, and what to call it."""

    kind: str
    grid: Grid

    def __str__(self) -> str:
        return f"{self.kind}: {self.grid}"

    def values(self, seed: int = 0, size: int = 1) -> Tensor:
        """Lopsided normal values of shape (3, 4, 5 * size, 5)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(3, 4, 5 * size, 5, generator=generator) + 0.3


def grids(_: Subject) -> Iterator[GridCase]:
    """Grids of activations and of weights."""
    for kind, grid in GRIDS.items():
        yield GridCase(kind, grid)


def powers_of_two(_: Subject) -> Iterator[GridCase]:
    """The same for devices that shift."""
    for kind, grid in POWERS.items():
        yield GridCase(kind, grid)


def per_channel(_: Subject) -> Iterator[GridCase]:
    """Those with a scale per channel."""
    for kind, grid in GRIDS.items():
        if grid.per_channel:
            yield GridCase(kind, grid)


def _calibrated(subject: Subject, case: GridCase, *batches: Tensor) -> Quantizer:
    quantizer: Quantizer = subject.make(case.grid)
    for batch in batches or (case.values(),):
        quantizer.observe(batch)
    return quantizer


def _shown(qparams: tuple[Tensor, Tensor]) -> str:
    scale, zero_point = qparams
    return f"scale {scale.flatten().tolist()[:4]}, zero point {zero_point.flatten().tolist()[:4]}"


def _same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], share: float = 0.0) -> bool:
    """Whether two ranges are equal; scales to within `share`."""
    return torch.allclose(a[0], b[0], rtol=share, atol=0.0) and torch.equal(a[1], b[1])


def _amiss(quantizer: Quantizer) -> str | None:
    """What is wrong with scale and zero point."""
    grid = quantizer.grid
    scale, zero_point = quantizer.qparams()
    for name, tensor, dtype in (
        ("scale", scale, torch.float32),
        ("zero point", zero_point, torch.int32),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != (grid.channels,):
            return (
                f"a {name} of shape {tuple(tensor.shape)} in {tensor.dtype}, "
                f"not ({grid.channels},) in {dtype}"
            )
    wrong = _no_step(scale)
    if wrong:
        return wrong
    if not bool(((zero_point >= grid.qmin) & (zero_point <= grid.qmax)).all()):
        return f"zero point {zero_point.tolist()}, outside of {grid.qmin} to {grid.qmax}"
    if grid.symmetric and bool(zero_point.any()):
        return f"zero point {zero_point.tolist()} on a symmetric grid"
    return None


def _no_step(scale: Tensor) -> str | None:
    """What is wrong with the size of a step."""
    good = torch.isfinite(scale) & (scale > 0)
    return None if bool(good.all()) else f"scale {scale.tolist()}"


@QUANTIZER.on(grids)
def parameters_are_valid(subject: Subject, case: GridCase) -> str | None:
    """`qparams` gives a positive float32 scale and an int32 zero point within the grid.

    Both are of shape (channels,), before anything was observed and afterwards; the zero point of a
    symmetric grid is 0.
    """
    return _amiss(subject.make(case.grid)) or _amiss(_calibrated(subject, case))


@QUANTIZER.on(grids)
def rounds_as_integer_arithmetic(subject: Subject, case: GridCase) -> str | None:
    """`forward` equals integer arithmetic with its own `qparams`, to the last bit.

    The integers are clamp(round(x / scale) + zero point), halves to even; they stand for
    (integer - zero point) * scale.
    """
    quantizer, grid = _calibrated(subject, case), case.grid
    x = 2 * case.values(1)  # some of them are clipped
    with torch.no_grad():
        found = quantizer(x)
        scale, zero_point = (grid.spread(part, x) for part in quantizer.qparams())
    steps = (x * (1 / scale)).round().to(torch.int64) + zero_point
    integers = steps.clamp(grid.qmin, grid.qmax)
    expected = (integers - zero_point).float() * scale
    if torch.equal(found, expected):
        return None
    at = int((found != expected).flatten().nonzero()[0])
    numbers = [t.expand_as(x).flatten()[at].item() for t in (x, scale, zero_point, integers)]
    value, step, zero, integer = numbers
    return (
        f"{found.flatten()[at].item()!r} for {value!r}, whose integer is {integer} at scale "
        f"{step!r} and zero point {zero}: {expected.flatten()[at].item()!r}"
    )


@QUANTIZER.on(grids)
def gradient_flows(subject: Subject, case: GridCase) -> str | None:
    """Gradients pass straight through where nothing is clipped, and reach learned ranges."""
    quantizer = _calibrated(subject, case)
    x = (3 * case.values(1)).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(x.shape, generator=generator) + 0.5
    (quantizer(x) * weights).sum().backward()
    if x.grad is None or not bool(torch.isfinite(x.grad).all()):
        return "no finite gradient of the input"
    with torch.no_grad():
        scale, zero_point = (case.grid.spread(part, x) for part in quantizer.qparams())
        steps = x / scale + zero_point
        inside = (steps > case.grid.qmin) & (steps < case.grid.qmax)
    if not torch.allclose(x.grad[inside], weights[inside]):
        return "a gradient of the input that is not the output's where nothing is clipped"
    for name, parameter in quantizer.named_parameters():
        if parameter.grad is None or not bool(torch.isfinite(parameter.grad).all()):
            return f"no finite gradient of the parameter {name}"
        if not bool(parameter.grad.any()):
            return f"a gradient of zero of the parameter {name}, though values are clipped"
    return None


@QUANTIZER.on(grids)
def calibration_in_one_batch_or_many(subject: Subject, case: GridCase) -> str | None:
    """Neither the size nor the order of the batches changes the range.

    Unless `follows_batches` says that it does; then the same batches give the same range again.
    """
    parts = [case.values(seed) * (1 + seed) for seed in range(4)]
    if subject.make(case.grid).follows_batches:
        first, again = (_calibrated(subject, case, *parts).qparams() for _ in range(2))
        return None if _same(first, again) else f"{_shown(first)} and then {_shown(again)}"
    if case.grid.per_channel:  # a weight is always seen as a whole
        many = _calibrated(subject, case, *parts)
        turned = _calibrated(subject, case, *reversed(parts))
        ways = {"in another order": turned}
    else:
        many = _calibrated(subject, case, *parts)
        ways = {
            "in another order": _calibrated(subject, case, *reversed(parts)),
            "in one batch": _calibrated(subject, case, torch.cat(parts)),
            "in larger batches": _calibrated(subject, case, torch.cat(parts[:3]), parts[3]),
        }
    for way, other in ways.items():
        if not _same(many.qparams(), other.qparams(), 1e-5):
            return (
                f"{_shown(many.qparams())} from four batches, and {_shown(other.qparams())} from "
                f"the same values {way}; follows_batches = False"
            )
    return None


@QUANTIZER.on(grids)
def state_dict_round_trip(subject: Subject, case: GridCase) -> str | None:
    """A state dict holds everything seen: one that loads it has the range and goes on alike."""
    seen, loaded = _calibrated(subject, case), subject.make(case.grid)
    loaded.load_state_dict(seen.state_dict())
    for when in ("loaded", "loaded and shown a further batch"):
        if not _same(seen.qparams(), loaded.qparams()):
            return f"{_shown(seen.qparams())}, and {_shown(loaded.qparams())} once {when}"
        for quantizer in (seen, loaded):
            quantizer.observe(4 * case.values(3))
    if not _same(seen.qparams(), loaded.qparams()):
        return f"{_shown(seen.qparams())}, and {_shown(loaded.qparams())} once {when}"
    return None


@QUANTIZER.on(grids)
def zero_stays_zero(subject: Subject, case: GridCase) -> str | None:
    """Zero comes out as exactly zero, also where only values above 5 were observed."""
    for name, values in (("these", case.values()), ("only large", case.values().abs() + 5)):
        found = _calibrated(subject, case, values)(torch.zeros(3, 4, 2, 2))
        if bool(found.any()):
            worst = found.abs().max().item()
            return f"{worst!r} for 0 after {name} values were observed"
    return None


@QUANTIZER.on(grids)
def constant_input(subject: Subject, case: GridCase) -> str | None:
    """Of a constant tensor the range holds that constant to one step, from 1e-20 to 1e20.

    A tensor of zeros has a valid range, too.
    """
    for value in (3.7, -3.7, 1e-20, 1e20, 0.0):
        quantizer = _calibrated(subject, case, torch.full((3, 4, 5, 5), value))
        wrong = _no_step(quantizer.qparams()[0])
        if wrong:
            return f"{wrong} after nothing but {value} was observed"
        if not value:
            continue  # zero_stays_zero
        found = quantizer(torch.full((3, 4, 1, 1), value))
        step = abs(value) / case.grid.qmax
        if not bool(((found - value).abs() <= 1.001 * step).all()):
            return f"{found.flatten()[0].item()!r} for {value} after nothing else was observed"
    return None


@QUANTIZER.on(grids)
def outlier_input(subject: Subject, case: GridCase) -> str | None:
    """One value of 1e6 among normal ones leaves a valid range that covers no more than was seen."""
    values = case.values(size=8)
    values[0, 0, 0, 0] = 1e6
    quantizer = _calibrated(subject, case, values)
    scale, zero_point = quantizer.qparams()
    wrong = _no_step(scale)
    if wrong:
        return wrong
    top = (case.grid.qmax - zero_point) * scale
    if bool((top > 1.01e6).any()):
        return f"a range up to {top.max().item():.6g}; the largest value seen is 1e6"
    return None


@QUANTIZER.on(powers_of_two)
def scales_are_powers_of_two(subject: Subject, case: GridCase) -> str | None:
    """On a grid of power-of-two scales, `qparams` gives such scales, also before it has seen any.

    `Grid.qparams` makes them of a range; a scale from elsewhere goes through `Grid.steps`.
    """
    for when, quantizer in (
        ("before anything was observed", subject.make(case.grid)),
        ("afterwards", _calibrated(subject, case)),
    ):
        scale, _ = quantizer.qparams()
        mantissa, _ = torch.frexp(scale)
        if not bool((mantissa == 0.5).all()):
            return f"scale {scale.flatten().tolist()[:4]} {when}"
    return None


@QUANTIZER.on(per_channel)
def each_channel_has_its_own_range(subject: Subject, case: GridCase) -> str | None:
    """With a scale per channel, larger values in one channel change no other channel's range."""
    x, axis = case.values(), case.grid.axis
    louder = x.clone()
    louder.select(axis, 0).mul_(8)
    (before, _), (after, _) = (_calibrated(subject, case, v).qparams() for v in (x, louder))
    if not torch.allclose(before[1:], after[1:], rtol=1e-5):
        return f"scales {before.tolist()} became {after.tolist()} when channel 0 grew eightfold"
    if not bool(after[0] > before[0]):
        return f"scale {before[0].item()} of channel 0 stayed {after[0].item()} when it grew"
    return None


@QUANTIZER.on(grids)
def an_empty_tensor_changes_nothing(subject: Subject, case: GridCase) -> str | None:
    """Observing a tensor without values is no error and leaves the range as it is."""
    shape = [3, 4, 0, 5]
    quantizer = _calibrated(subject, case)
    before = tuple(part.clone() for part in quantizer.qparams())
    quantizer.observe(torch.zeros(shape))
    after = quantizer.qparams()
    if not _same((before[0], before[1]), after):
        return f"{_shown((before[0], before[1]))} became {_shown(after)}"
    return None


def empty_data(_: Subject) -> Iterator[list[Tensor]]:
    """Calibration data that holds no sample: no batch, and a batch of none."""
    yield []
    yield [torch.zeros(0, 4)]


@QUANTIZER.on(empty_data)
def an_empty_calibration_is_refused(subject: Subject, data: list[Tensor]) -> str | None:
    """Calibrating a model on data that holds no sample is a QuantizationError."""
    network = nn.Linear(4, 4)
    fake = FakeQuantization.of(network, (torch.zeros(1, 4),), _SCHEME, subject.make, subject.make)
    try:
        calibrate_(fake, network, data, len(data))
    except QuantizationError:
        return None
    scales = [fake[name].qparams()[0].tolist() for name in fake.sites.activations]
    return f"a calibrated model with the scales {scales}"


@QUANTIZER.on(grids)
def half_precision(subject: Subject, case: GridCase) -> str | None:
    """float16 and bfloat16 tensors give the range of the same values in float32.

    What comes out has the precision that went in.
    """
    for precision in (torch.float16, torch.bfloat16):
        x = case.values().to(precision)
        found = _calibrated(subject, case, x)
        expected = _calibrated(subject, case, x.float())
        if not _same(found.qparams(), expected.qparams(), 1e-3):
            return f"{_shown(found.qparams())} in {precision}, {_shown(expected.qparams())} before"
        if found(x).dtype != precision:
            return f"{found(x).dtype} out of {precision}"
    return None


@QUANTIZER.on(grids)
def keeps_no_graph(subject: Subject, case: GridCase) -> str | None:
    """What is observed during training is not kept in autograd's graph, or memory would grow."""
    quantizer = subject.make(case.grid)
    quantizer.observe(case.values().requires_grad_() * 2)
    held = [
        name
        for name, tensor in [*quantizer.named_buffers(), *quantizer.named_parameters()]
        if tensor.grad_fn is not None
    ]
    return f"{held} hold a graph" if held else None
