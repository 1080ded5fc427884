"""What a distillation loss promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Pair:
    """A student's and its teacher's tensor, and what to call them."""

    kind: str
    student: Tensor
    teacher: Tensor

    def __str__(self) -> str:
        text = f"{self.kind} of shape {tuple(self.student.shape)} in {self.student.dtype}"
        if self.student.numel() <= 8:
            text += f"\nstudent = {self.student.tolist()}\nteacher = {self.teacher.tolist()}"
        return text


def all_pairs(_: Subject) -> Iterator[Pair]:
    """Logits, tokens, feature maps and volumes, the smallest first."""
    for seed, (kind, shape) in enumerate(SHAPES.items()):
        student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
        yield Pair(kind, student, teacher)


def pairs(subject: Subject) -> Iterator[Pair]:
    """Those that the loss takes."""
    for pair in all_pairs(subject):
        try:
            subject.make()(pair.student.clone(), pair.teacher.clone())
        except Exception:  # takes_what_it_does_not_refuse says which of them are wrong
            continue
        yield pair


def _value(subject: Subject, student: Tensor, teacher: Tensor) -> float:
    with torch.no_grad():
        return float(subject.make().eval()(student.clone(), teacher.clone()))


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
            subject.make()(pair.student.clone(), pair.teacher.clone())
        except ValueError as error:
            if not str(error).strip():
                return f"{pair.kind} of shape {tuple(pair.student.shape)}: an error without a text"
            refused.append(f"{pair.kind} of shape {tuple(pair.student.shape)}: {error}")
        except Exception as error:
            return (
                f"{pair.kind} of shape {tuple(pair.student.shape)}: {type(error).__name__}: {error}"
            )
    return None if len(refused) < len(SHAPES) else "it takes none of\n" + "\n".join(refused)


@LOSS.on(pairs)
def is_a_finite_scalar(subject: Subject, pair: Pair) -> str | None:
    """The loss is a scalar, finite and at least 0, also where the values are 100 times as large."""
    for factor in (1.0, 100.0):
        value = subject.make()(factor * pair.student, factor * pair.teacher)
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
    loss = subject.make()
    if loss.when_equal not in EQUAL:
        return f"when_equal = {loss.when_equal!r} is none of {', '.join(EQUAL)}"
    if loss.when_equal == "any":
        return None
    equal = _value(subject, pair.teacher, pair.teacher)
    apart = _value(subject, pair.student, pair.teacher)
    if loss.when_equal == "zero" and abs(equal) > 1e-5 * max(1.0, apart):
        return f"{equal:.6g} for equal tensors; when_equal = 'zero'"
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        noise = size * torch.randn(pair.teacher.shape, generator=generator)
        near = _value(subject, pair.teacher + noise, pair.teacher)
        if near < equal - 1e-5 * max(1.0, abs(equal)):
            return f"{equal:.6g} for equal tensors, but {near:.6g} with noise of {size}"
    return None if apart > equal else f"{apart:.6g} for tensors that differ, {equal:.6g} for equal"


@LOSS.on(pairs)
def gradient_reaches_the_student_only(subject: Subject, pair: Pair) -> str | None:
    """A finite gradient reaches the student, in more than one place; the teacher stays as it is."""
    student = pair.student.clone().requires_grad_()
    teacher = pair.teacher.clone()
    value = subject.make()(student, teacher)
    if not value.requires_grad:
        return "a loss without gradient"
    value.backward()
    if student.grad is None:
        return "no gradient of the student"
    if not bool(torch.isfinite(student.grad).all()):
        return "a gradient of the student that is not finite"
    if int((student.grad != 0).sum()) < 2:
        return "a gradient of the student that is zero (nearly) everywhere"
    if teacher.requires_grad or not torch.equal(teacher, pair.teacher):
        return "the teacher's tensor was changed"
    return None


@LOSS.on(pairs)
def is_the_mean_over_the_batch(subject: Subject, pair: Pair) -> str | None:
    """A batch that holds every sample twice has the same loss: its weight fits any batch size."""
    once_, twice = (
        _value(subject, *(torch.cat([x] * times) for x in (pair.student, pair.teacher)))
        for times in (1, 2)
    )
    if math.isclose(once_, twice, rel_tol=1e-4, abs_tol=1e-6):
        return None
    return f"{once_:.6g} for {len(pair.student)} samples, {twice:.6g} for all of them twice"


@LOSS.on(pairs)
def half_precision(subject: Subject, pair: Pair) -> str | None:
    """In float16 and bfloat16 the loss is, to 2 %, that of the same values in float32.

    Values of 300 are tried as well: squared they exceed what float16 holds.
    """
    for precision in (torch.float16, torch.bfloat16):
        for factor in (1.0, 300.0):
            halves = [(factor * x).to(precision) for x in (pair.student, pair.teacher)]
            found = _value(subject, *halves)
            expected = _value(subject, *(x.float() for x in halves))
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
        mask: Any = torch.ones_like(pair.student)
        mask[:, masked] = 0.0
        student = pair.student.clone().requires_grad_()
        value = subject.make()(student * mask, pair.teacher)
        value.backward()
        if not math.isfinite(value.item()):
            return f"{value.item()} with {what} of the student masked"
        if student.grad is not None and not bool(torch.isfinite(student.grad).all()):
            return f"a gradient that is not finite with {what} of the student masked"
    return None
