"""Losses on features and boxes against small examples worked out by hand."""

import math

import numpy as np
import pytest
import torch

from slimkit.builtin.losses.attention import Attention
from slimkit.builtin.losses.box import Box, overlap
from slimkit.builtin.losses.cosine import Cosine
from slimkit.builtin.losses.cwd import CWD
from slimkit.builtin.losses.fsp import FSP
from slimkit.builtin.losses.hint import Hint


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_attention_of_two_positions_by_hand():
    # one channel: squares 9, 16 and 0, 1; over their L2 norms (sqrt(337)) and 1
    student, teacher = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 1.0]]])
    norm = math.sqrt(9**2 + 16**2)
    expected = ((9 / norm) ** 2 + (16 / norm - 1) ** 2) / 2
    assert Attention()(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_attention_compares_networks_of_other_widths():
    wide = random(2, 6, 4, 4)
    assert Attention()(wide, wide.repeat(1, 2, 1, 1)).item() == pytest.approx(0, abs=1e-12)


def test_attention_with_power_one_is_of_absolute_values():
    student, teacher = torch.tensor([[[3.0, -4.0]]]), torch.tensor([[[0.6, 0.8]]])
    assert Attention(power=1.0)(student, teacher).item() == pytest.approx(0, abs=1e-12)


def test_cwd_is_a_divergence_over_positions_of_each_channel():
    student, teacher, temperature = random(2, 3, 2, 2), random(2, 3, 2, 2, seed=1), 3.0
    expected = 0.0
    for s, t in zip(student.reshape(6, 4).tolist(), teacher.reshape(6, 4).tolist(), strict=True):
        q, p = (np.exp(np.array(x) / temperature) for x in (s, t))
        q, p = q / q.sum(), p / p.sum()
        expected += float((p * np.log(p / q)).sum()) * temperature**2 / 6
    value = CWD(temperature=temperature)(student, teacher).item()
    assert value == pytest.approx(expected, rel=1e-5)


def test_cwd_does_not_see_the_level_of_a_channel():
    x = random(2, 3, 4, 4)
    assert CWD()(x + random(2, 3, 1, 1, seed=1), x).item() == pytest.approx(0, abs=1e-6)


def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The paper's definition, entry by entry."""
    n, a, h, w = first.shape
    b = second.shape[1]
    found = np.zeros((n, a, b))
    for i in range(a):
        for j in range(b):
            for y in range(h):
                for x in range(w):
                    found[:, i, j] += first[:, i, y, x] * second[:, j, y, x] / (h * w)
    return found


def test_fsp_is_the_difference_of_two_products():
    s, t = ((random(2, 3, 2, 2, seed=i), random(2, 4, 2, 2, seed=i + 9)) for i in (0, 1))
    apart = flow(*(x.numpy() for x in s)) - flow(*(x.numpy() for x in t))
    assert FSP()(s, t).item() == pytest.approx((apart**2).mean(), rel=1e-5)


def test_fsp_pools_the_larger_map_to_the_smaller():
    s = (random(2, 3, 4, 4), random(2, 4, 2, 2, seed=1))
    zeros = tuple(torch.zeros_like(x) for x in s)
    pooled = s[0].numpy().reshape(2, 3, 2, 2, 2, 2).max((3, 5))
    expected = (flow(pooled, s[1].numpy()) ** 2).mean()
    assert FSP()(s, zeros).item() == pytest.approx(expected, rel=1e-5)


def test_cosine_is_over_the_channels_at_each_position():
    s = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]).transpose(1, 2)[..., None]  # (1, 2, 2, 1)
    t = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]]).transpose(1, 2)[..., None]
    assert Cosine()(s, t).item() == pytest.approx((0 + 1 - math.sqrt(0.5)) / 2, rel=1e-6)


def test_cosine_of_tokens_is_over_their_last_dimension():
    s, t = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    assert Cosine()(s, t).item() == pytest.approx((0 + 1 - math.sqrt(0.5)) / 2, rel=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 3, 3), (4, 2, 2, 2)], ids=str)
def test_hint_is_the_mse_of_a_convolution_with_its_weights(shape):
    student, teacher = random(2, *shape), random(2, 6, *shape[1:], seed=1)
    if len(shape) == 2:  # tokens: channels last
        student, teacher = random(2, 3, 4), random(2, 3, 6, seed=1)
    loss = Hint()
    loss.prepare(student, teacher)
    w, b = (p.detach().numpy() for p in (loss.projection.weight, loss.projection.bias))
    s, t = (
        x.numpy() if x.dim() == 3 else np.moveaxis(x.numpy(), 1, -1) for x in (student, teacher)
    )
    expected = ((s @ w.T + b - t) ** 2).mean()
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_hint_learns_what_a_linear_map_can_explain():
    student = random(64, 4, 2, 2)
    teacher = torch.einsum("oc,nchw->nohw", random(6, 4, seed=1), student)
    loss = Hint()
    loss.prepare(student, teacher)
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    assert loss(student, teacher).item() < 1e-3 * teacher.square().mean()


BOX = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([0.0, 0.0, 2.0, 2.0], 1.0),
        ([1.0, 0.0, 3.0, 2.0], 2 / 6),  # overlap 2 of 6, nothing else around them
        ([1.0, 1.0, 3.0, 3.0], 1 / 7 - 2 / 9),  # 1 of 7, in a square of 9
        ([4.0, 0.0, 6.0, 2.0], 0 - 4 / 12),  # apart, 4 of 12 between them
    ],
)
def test_generalised_overlap_by_hand(other, expected):
    assert overlap(BOX, torch.tensor([[other]])).item() == pytest.approx(expected, abs=1e-5)


def test_boxes_may_be_written_in_three_ways():
    corners = torch.tensor([[[1.0, 0.0, 3.0, 2.0]]])
    expected = Box()(corners, BOX).item()
    centre = torch.tensor([[[2.0, 1.0, 2.0, 2.0]]]), torch.tensor([[[1.0, 1.0, 2.0, 2.0]]])
    assert Box(form="cxcywh")(*centre).item() == pytest.approx(expected, rel=1e-5)
    sides = torch.tensor([[[0.5, 1.0, 1.5, 1.0]]]), torch.tensor([[[1.5, 1.0, 0.5, 1.0]]])
    assert Box(form="ltrb")(*sides).item() == pytest.approx(expected, rel=1e-5)


def test_boxes_are_weighed_by_the_teachers_score():
    apart, same = [1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 2.0, 2.0]
    student = torch.tensor([[[*apart, 0.0], [*same, 0.0]]])
    teacher = torch.tensor([[[*same, 0.25], [*same, 0.75]]])
    expected = 0.25 * (1 - 2 / 6) / (0.25 + 0.75)
    assert Box(score=4)(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_boxes_of_a_map_lie_in_another_dimension():
    rows = torch.rand(2, 9, 4), torch.rand(2, 9, 4)
    maps = [x.transpose(1, 2).reshape(2, 4, 3, 3) for x in rows]
    assert Box(dim=1)(*maps).item() == pytest.approx(Box()(*rows).item(), rel=1e-6)


def test_boxes_apart_are_pulled_together():
    student = torch.tensor([[[5.0, 5.0, 6.0, 6.0]]], requires_grad=True)
    Box()(student, BOX).backward()
    assert (student.grad[..., :2] > 0).all()  # against it, left and up
