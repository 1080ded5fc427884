"""`dkd`, `dist` and `bce-logits` against what their papers write, number by number in NumPy."""

import math

import numpy as np
import pytest
import torch

from slimkit.builtin.losses.bce_logits import BCELogits
from slimkit.builtin.losses.dist import DIST
from slimkit.builtin.losses.dkd import DKD
from slimkit.builtin.losses.kl import KL

STUDENT = torch.tensor([[0.3, -1.2, 2.0], [1.5, 0.1, -0.4], [-0.2, 0.9, 0.4], [0.0, 1.1, -2.0]])
TEACHER = torch.tensor([[1.0, 0.2, 3.0], [2.5, -1.0, 0.3], [0.1, 0.0, 1.4], [-1.0, 2.0, 0.5]])
LABELS = torch.tensor([2, 0, 2, 1])


def softmax(row) -> list[float]:
    weights = [math.exp(x) for x in row]
    return [w / sum(weights) for w in weights]


def divergence(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def decoupled(temperature: float) -> tuple[float, float]:
    """The target's and the other classes' part, with probabilities as the paper defines them."""
    target = others = 0.0
    for s, t, y in zip(STUDENT.tolist(), TEACHER.tolist(), LABELS.tolist(), strict=True):
        q, p = softmax([x / temperature for x in s]), softmax([x / temperature for x in t])
        target += divergence([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        without = [[x / (1 - r[y]) for i, x in enumerate(r) if i != y] for r in (p, q)]
        others += divergence(*without)
    return target / len(LABELS), others / len(LABELS)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_weighs_the_target_and_the_others(temperature):
    target, others = decoupled(temperature)
    value = DKD(alpha=0.5, beta=3.0, temperature=temperature)(STUDENT, TEACHER, labels=LABELS)
    assert value.item() == pytest.approx((0.5 * target + 3 * others) * temperature**2, rel=1e-5)


def test_dkd_with_the_teachers_own_factor_is_kl():
    """Equation 7 of the paper: KL is the target's part plus (1 - p_target) times the others'."""
    one = [x[:1] for x in (STUDENT, TEACHER)]
    rest = 1 - TEACHER[0].softmax(0)[LABELS[0]].item()
    value = DKD(alpha=1.0, beta=rest, temperature=1.0)(*one, labels=LABELS[:1]).item()
    assert value == pytest.approx(KL(temperature=1.0)(*one).item(), rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 2, -1], [0.5, 1.0, 0.0, 0.0], [0, 1]])
def test_dkd_refuses_labels_that_are_no_classes(labels):
    with pytest.raises(ValueError, match="label"):
        DKD()(STUDENT, TEACHER, labels=torch.tensor(labels))


def test_dist_is_one_minus_pearsons_correlations():
    q, p = (np.array([softmax(row) for row in x.tolist()]) for x in (STUDENT, TEACHER))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    value = DIST(inter=2.0, intra=0.5)(STUDENT, TEACHER).item()
    assert value == pytest.approx(2 * inter + 0.5 * intra, rel=1e-5)


def test_dist_does_not_mind_how_sure_the_teacher_is():
    """A linear change of the probabilities keeps the correlations."""
    p = TEACHER.softmax(1)
    flatter = (0.3 * p + 0.7 / 3).log()
    assert DIST()(flatter, TEACHER).item() == pytest.approx(0, abs=1e-6)


def test_bce_logits_is_the_divergence_of_each_answer():
    by_hand = np.mean(
        [
            divergence([p, 1 - p], [q, 1 - q])
            for s, t in zip(STUDENT.flatten().tolist(), TEACHER.flatten().tolist(), strict=True)
            for q, p in [(1 / (1 + math.exp(-s)), 1 / (1 + math.exp(-t)))]
        ]
    )
    assert BCELogits()(STUDENT, TEACHER).item() == pytest.approx(by_hand, rel=1e-5)


def test_bce_logits_with_focus_weighs_by_the_distance_of_the_probabilities():
    s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])  # 1/2 and 3/4
    one = divergence([0.75, 0.25], [0.5, 0.5])
    value = BCELogits(focus=2.0)(s, t).item()
    assert value == pytest.approx(one * 0.25**2 / 2, rel=1e-5)


@pytest.mark.parametrize("loss", [KL(), DIST(), BCELogits()])
def test_other_classes_are_said(loss):
    with pytest.raises(ValueError, match="the student has 3 classes and the teacher 5"):
        loss(STUDENT, torch.zeros(4, 5))


@pytest.mark.parametrize("kind", [KL, DIST])
def test_tokens_have_their_classes_last(kind):
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    expected = kind()(student.reshape(10, 3), teacher.reshape(10, 3))
    torch.testing.assert_close(kind(dim=-1)(student, teacher), expected)
    torch.testing.assert_close(kind()(student.mT, teacher.mT), expected)
    for dim in (0, 3, -3):
        with pytest.raises(ValueError, match="is no dimension of classes"):
            kind(dim=dim)(student, teacher)
