"""What losses ask of the tensors that they compare, and the views they take of them."""

from __future__ import annotations

import torch
from torch import Tensor


def same_shape(student: Tensor, teacher: Tensor, way_out: str) -> None:
    """Refuse tensors of different shapes; `way_out` ends the message.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} "
            f"differ: {way_out}"
        )


def same_samples(student: Tensor, teacher: Tensor) -> None:
    """Refuse tensors of other than the same samples.

    Raises:
        ValueError: dimension 0 differs, or holds a single sample.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"the student gives {len(student)} samples and the teacher {len(teacher)}: name places "
            "whose dimension 0 is the batch"
        )
    if len(student) < 2:
        raise ValueError(
            "a single sample has no relation to others: use batches of two or more, and "
            "drop_last=True in the loader"
        )


def class_logits(student: Tensor, teacher: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Logits (batch, classes, ...), of which `dim` are the classes, as it is given.

    Raises:
        ValueError: the shapes differ, or there are no two classes.
    """
    least = min(student.dim(), teacher.dim())
    if least < 2:
        logits(student, teacher)
    if not -least <= dim < least or dim % least == 0:
        raise ValueError(
            f"dim: {dim} is no dimension of classes in logits {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    student, teacher = student.movedim(dim, 1), teacher.movedim(dim, 1)
    logits(student, teacher)
    if student.shape[1] == 1:
        raise ValueError(
            "the softmax of a single logit is always 1 and teaches nothing: take bce-logits, for a "
            "regression feature-mse, or write distill: false"
        )
    return student, teacher


def logits(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits of different shapes, (batch, classes, ...).

    Raises:
        ValueError: the shapes differ, or there is no dimension of classes.
    """
    classes = [x.shape[1] if x.dim() > 1 else 0 for x in (student, teacher)]
    if 0 in classes:
        raise ValueError(
            f"logits have the shape (batch, classes, ...), not {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if classes[0] != classes[1]:
        raise ValueError(
            f"the student has {classes[0]} classes and the teacher {classes[1]}: choose a teacher "
            "of the same classes, or a loss on features"
        )
    same_shape(student, teacher, "name places of the same size")


def channels_last(x: Tensor) -> Tensor:
    """The same with its channels last, in float32: (batch, ..., channels).

    Channels are dimension 1 of features (batch, channels) and maps (batch, channels, height,
    width), and the last one of tokens (batch, length, channels).

    Raises:
        ValueError: there are no channels.
    """
    if x.dim() < 2:
        raise ValueError(f"features have two dimensions or more, not {tuple(x.shape)}")
    return x.float() if x.dim() == 3 else x.float().movedim(1, -1)


def positions(x: Tensor, y: Tensor) -> None:
    """Refuse maps (batch, channels, *positions) over other positions.

    Raises:
        ValueError: there are no positions, or they differ.
    """
    if x.dim() < 3 or x.shape[2:] != y.shape[2:] or len(x) != len(y):
        raise ValueError(
            f"the student's {tuple(x.shape)} and the teacher's {tuple(y.shape)} must be maps "
            "(batch, channels, *positions) of the same positions: name places of the same size"
        )


def unit(x: Tensor) -> Tensor:
    """Each row (dimension -1) over its L2 norm; a row of zeros stays, with a finite gradient."""
    squares = x.square().sum(-1, keepdim=True)
    return x / torch.where(squares > 0, squares, 1.0).sqrt()
