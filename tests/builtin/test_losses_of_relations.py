"""Losses on relations between samples against loops over pairs and triplets."""

import itertools
import math

import numpy as np
import pytest
import torch

from slimkit.builtin.losses.crd import CRD
from slimkit.builtin.losses.pkt import PKT
from slimkit.builtin.losses.rkd import RKD
from slimkit.builtin.losses.similarity import Similarity


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = random(5, 3), random(5, 7, seed=1)  # of other widths


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_rkd_distances_are_over_their_mean():
    def distances(x):
        found = {p: math.dist(*x[[*p]]) for p in itertools.permutations(range(5), 2)}
        mean = sum(found.values()) / len(found)
        return {p: d / mean for p, d in found.items()}

    s, t = distances(STUDENT.numpy()), distances(TEACHER.numpy())
    expected = sum(huber(s[p] - t[p]) for p in s) / 25
    assert RKD(angle=0)(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-4)


def test_rkd_angles_are_cosines_at_each_sample():
    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    s, t = STUDENT.numpy(), TEACHER.numpy()
    triplets = [p for p in itertools.product(range(5), repeat=3) if p[0] not in p[1:]]
    expected = sum(huber(cosine(s, *p) - cosine(t, *p)) for p in triplets) / 125
    assert RKD(distance=0, angle=1)(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-4)


def test_rkd_sees_shape_only():
    """Moved, turned and scaled features have the same distances (over their mean) and angles."""
    turn = torch.linalg.qr(random(7, 7, seed=2)).Q
    moved = 3 * TEACHER @ turn + random(7, seed=3)
    assert RKD()(moved, TEACHER).item() == pytest.approx(0, abs=1e-6)


def test_similarity_is_over_the_norm_of_each_row():
    def matrix(x):
        products = np.array([[a @ b for b in x] for a in x])
        return np.array([row / np.sqrt((row**2).sum()) for row in products])

    apart = matrix(STUDENT.numpy()) - matrix(TEACHER.numpy())
    expected = (apart**2).sum() / 25
    assert Similarity()(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-5)


def test_pkt_is_the_divergence_of_neighbourhoods():
    def probabilities(x):
        found = np.zeros((5, 5))
        for i, j in itertools.product(range(5), repeat=2):
            cosine = x[i] @ x[j] / (np.linalg.norm(x[i]) * np.linalg.norm(x[j]))
            found[i, j] = (cosine + 1) / 2
        return found / found.sum(1, keepdims=True)

    q, p = probabilities(STUDENT.numpy()), probabilities(TEACHER.numpy())
    expected = (p * np.log(p / q)).sum(1).mean()
    assert PKT()(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-4)


def test_crd_is_the_cross_entropy_of_finding_ones_own_teacher():
    loss = CRD(dimensions=4, temperature=0.5)
    loss.prepare(STUDENT, TEACHER)

    def sphere(layer, x):
        y = layer.weight.detach().numpy() @ x.T + layer.bias.detach().numpy()[:, None]
        return y / np.linalg.norm(y, axis=0)

    s, t = sphere(loss.student, STUDENT.numpy()), sphere(loss.teacher, TEACHER.numpy())
    near = np.exp(s.T @ t / 0.5)
    there = np.mean([-math.log(near[i, i] / near[i].sum()) for i in range(5)])
    back = np.mean([-math.log(near[i, i] / near[:, i].sum()) for i in range(5)])
    value = loss(STUDENT, TEACHER).item()
    assert value == pytest.approx((there + back) / 2, rel=1e-4)


def test_crd_of_a_map_is_of_its_mean_over_positions():
    maps = random(5, 3, 2, 2), random(5, 7, 2, 2, seed=1)
    loss = CRD()
    loss.prepare(*maps)
    means = [x.mean((2, 3)) for x in maps]
    assert loss(*maps).item() == pytest.approx(loss(*means).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [RKD(), Similarity(), PKT()])
def test_one_sample_has_no_relations(loss):
    with pytest.raises(ValueError, match="a single sample"):
        loss(STUDENT[:1], TEACHER[:1])
