"""What a distillation loss promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slimkit.interfaces import DistillationLoss
from slimkit.testing.promises import Promises, Subject

LOSS = Promises()

SHAPES = {
    "logits": (2, 3),
    "logits of more classes": (4, 10),
    "tokens": (4, 6, 5),
    "feature maps": (4, 6, 8, 8),
    "volumes": (2, 4, 4, 4, 4),
}
"""Dimension 0 is the batch and dimension 1 holds classes or channels, as in the model's tensors."""

EQUAL = ("zero", "least", "any")
"""What `DistillationLoss.when_equal` may say."""


Side = Any
"""What the student or the teacher gives: a tensor, or a tuple of them from several places."""


def each(change: Callable[[Tensor], Tensor], side: Side) -> Side:
    """`change` of every tensor of one side."""
    return tuple(map(change, side)) if isinstance(side, tuple) else change(side)


def parts(side: Side) -> tuple[Tensor, ...]:
    """The tensors of one side."""
    return side if isinstance(side, tuple) else (side,)


@dataclass(frozen=True)
class Pair:
    """What a student and its teacher give, the batch's labels, and what to call it."""

    kind: str
    student: Side
    teacher: Side
    labels: Tensor

    @property
    def shapes(self) -> str:
        """Of one side."""
        return ", ".join(str(tuple(x.shape)) for x in parts(self.student))

    def __str__(self) -> str:
        text = f"{self.kind} of shape {self.shapes} in {parts(self.student)[0].dtype}"
        if sum(x.numel() for x in parts(self.student)) <= 8:
            student, teacher = (
                [x.tolist() for x in parts(side)] for side in (self.student, self.teacher)
            )
            text += f"\nstudent = {student}\nteacher = {teacher}\nlabels = {self.labels.tolist()}"
        return text


def all_pairs(subject: Subject) -> Iterator[Pair]:
    """Logits, tokens, feature maps and volumes, the smallest first; of each place one."""
    places = subject.make().places
    for seed, (kind, shape) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(seed)
        found = [torch.randn(2, *shape, generator=generator) for _ in range(places)]
        student, teacher = (x[0] for x in found), (x[1] for x in found)
        labels = torch.arange(shape[0]) % shape[1]
        if places > 1:
            yield Pair(kind, tuple(student), tuple(teacher), labels)
        else:
            yield Pair(kind, next(student), next(teacher), labels)


def made(subject: Subject, pair: Pair) -> DistillationLoss:
    """The loss, with what it learns made for these tensors, always from the same numbers."""
    loss: DistillationLoss = subject.make()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        loss.prepare(pair.student, pair.teacher)
    return loss


def compared(loss: DistillationLoss, student: Side, teacher: Side, labels: Tensor) -> Tensor:
    """The loss of one batch, given what it `needs`."""
    more = {"labels": labels} if "labels" in loss.needs else {}
    value: Tensor = loss(student, teacher, **more)
    return value


def pairs(subject: Subject) -> Iterator[Pair]:
    """Those that the loss takes."""
    for pair in all_pairs(subject):
        try:
            _value(subject, pair)
        except Exception:  # takes_what_it_does_not_refuse says which of them are wrong
            continue
        yield pair


def _value(subject: Subject, pair: Pair, **changed: Any) -> float:
    """Of copies; `changed` sides or labels are compared in place of the pair's."""
    given = replace(pair, **changed)
    student, teacher = each(Tensor.clone, given.student), each(Tensor.clone, given.teacher)
    with torch.no_grad():
        return float(compared(made(subject, pair).eval(), student, teacher, given.labels))


def once(_: Subject) -> Iterator[str]:
    """No case but the loss itself."""
    yield "the loss by itself"


@LOSS.on(once)
def takes_what_it_does_not_refuse(subject: Subject, _case: str) -> str | None:
    """It takes logits, tokens, feature maps or volumes; what it does not take is a ValueError.

    The error's text says what is wrong with the shapes.
    """
    refused = []
    for pair in all_pairs(subject):
        try:
            student, teacher = each(Tensor.clone, pair.student), each(Tensor.clone, pair.teacher)
            compared(made(subject, pair), student, teacher, pair.labels)
        except ValueError as error:
            if not str(error).strip():
                return f"{pair.kind} of shape {pair.shapes}: an error without a text"
            refused.append(f"{pair.kind} of shape {pair.shapes}: {error}")
        except Exception as error:
            return f"{pair.kind} of shape {pair.shapes}: {type(error).__name__}: {error}"
    return None if len(refused) < len(SHAPES) else "it takes none of\n" + "\n".join(refused)


@LOSS.on(pairs)
def is_a_finite_scalar(subject: Subject, pair: Pair) -> str | None:
    """The loss is a scalar, finite and at least 0, also where the values are 100 times as large."""
    for factor in (1.0, 100.0):
        sides = [
            each(lambda x, by=factor: by * x, side)  # type: ignore[misc]
            for side in (pair.student, pair.teacher)
        ]
        value = compared(made(subject, pair), sides[0], sides[1], pair.labels)
        times = "" if factor == 1 else f" for {factor:.0f} times these values"
        if not isinstance(value, Tensor):
            return f"a {type(value).__name__} instead of a tensor"
        if value.dim() or not value.is_floating_point():
            return f"a tensor of shape {tuple(value.shape)} in {value.dtype}{times}"
        if not (math.isfinite(value.item()) and value.item() >= 0):
            return f"{value.item()}{times}"
    return None


@LOSS.on(pairs)
def is_as_declared_for_equal_inputs(subject: Subject, pair: Pair) -> str | None:
    """Where the student equals the teacher the loss is what `when_equal` says: zero, or least."""
    loss: DistillationLoss = subject.make()
    if loss.when_equal not in EQUAL:
        return f"when_equal = {loss.when_equal!r} is none of {', '.join(EQUAL)}"
    if loss.when_equal == "any":
        return None
    equal = _value(subject, pair, student=pair.teacher)
    apart = _value(subject, pair)
    if loss.when_equal == "zero" and abs(equal) > 1e-5 * max(1.0, apart):
        return f"{equal:.6g} for equal tensors; when_equal = 'zero'"
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        moved = each(lambda x: x + size * torch.randn(x.shape, generator=generator), pair.teacher)  # noqa: B023
        near = _value(subject, pair, student=moved)
        if near < equal - 1e-5 * max(1.0, abs(equal)):
            return f"{equal:.6g} for equal tensors, but {near:.6g} with noise of {size}"
    return None if apart > equal else f"{apart:.6g} for tensors that differ, {equal:.6g} for equal"


@LOSS.on(pairs)
def gradient_reaches_the_student_only(subject: Subject, pair: Pair) -> str | None:
    """A finite gradient reaches the student, in more than one place; the teacher stays as it is."""
    student = each(lambda x: x.clone().requires_grad_(), pair.student)
    teacher = each(Tensor.clone, pair.teacher)
    value = compared(made(subject, pair), student, teacher, pair.labels)
    if not value.requires_grad:
        return "a loss without gradient"
    value.backward()
    for part in parts(student):
        if part.grad is None:
            return "no gradient of the student"
        if not bool(torch.isfinite(part.grad).all()):
            return "a gradient of the student that is not finite"
        if int((part.grad != 0).sum()) < 2:
            return "a gradient of the student that is zero (nearly) everywhere"
    for mine, before in zip(parts(teacher), parts(pair.teacher), strict=True):
        if mine.requires_grad or not torch.equal(mine, before):
            return "the teacher's tensor was changed"
    return None


@LOSS.on(pairs)
def is_the_mean_over_the_batch(subject: Subject, pair: Pair) -> str | None:
    """A batch that holds every sample twice has the same loss: its weight fits any batch size.

    Not where `compares_samples` says that samples of a batch are compared with each other.
    """
    if subject.make().compares_samples:
        return None
    sides = [each(lambda x: torch.cat([x, x]), side) for side in (pair.student, pair.teacher)]
    labels = torch.cat([pair.labels, pair.labels])
    once_ = _value(subject, pair)
    twice = _value(subject, pair, student=sides[0], teacher=sides[1], labels=labels)
    if math.isclose(once_, twice, rel_tol=1e-4, abs_tol=1e-6):
        return None
    return f"{once_:.6g} for {len(pair.labels)} samples, {twice:.6g} for all of them twice"


@LOSS.on(pairs)
def half_precision(subject: Subject, pair: Pair) -> str | None:
    """In float16 and bfloat16 the loss is, to 2 %, that of the same values in float32.

    Values of 300 are tried as well: squared they exceed what float16 holds.
    """
    for precision in (torch.float16, torch.bfloat16):
        for factor in (1.0, 300.0):
            halves = [
                each(lambda x: (factor * x).to(precision), side)  # noqa: B023
                for side in (pair.student, pair.teacher)
            ]
            wide = [each(Tensor.float, side) for side in halves]
            found = _value(subject, pair, student=halves[0], teacher=halves[1])
            expected = _value(subject, pair, student=wide[0], teacher=wide[1])
            if not math.isclose(found, expected, rel_tol=0.02, abs_tol=1e-4):
                times = "" if factor == 1 else f" for {factor:.0f} times these values"
                return f"{found:.6g} in {precision}, {expected:.6g} in float32{times}"
    return None


@LOSS.on(pairs)
def masked_channels(subject: Subject, pair: Pair) -> str | None:
    """A student of whose channels some or all are masked to zero has a finite loss and gradient.

    Pruning masks channels before it removes them.
    """
    for what, masked in (("channel 0", slice(0, 1)), ("all channels", slice(None))):
        student = each(lambda x: x.clone().requires_grad_(), pair.student)
        alive = each(lambda x: _without(x, masked), student)  # noqa: B023
        value = compared(made(subject, pair), alive, pair.teacher, pair.labels)
        value.backward()
        if not math.isfinite(value.item()):
            return f"{value.item()} with {what} of the student masked"
        gradients = [x.grad for x in parts(student) if x.grad is not None]
        if not all(bool(torch.isfinite(grad).all()) for grad in gradients):
            return f"a gradient that is not finite with {what} of the student masked"
    return None


def _without(x: Tensor, channels: slice) -> Tensor:
    """The same with zeros in these channels."""
    mask = torch.ones_like(x)
    mask[:, channels] = 0.0
    return x * mask
