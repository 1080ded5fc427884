"""Each distillation loss on two samples of two numbers, written out."""

import math

import pytest
import torch

from slimkit.builtin.losses.feature_mse import FeatureMSE
from slimkit.builtin.losses.kl import KL


def test_kl_of_two_samples_is_their_mean_divergence():
    # teacher (1/2, 1/2) and student (1/4, 3/4) differ; the second sample agrees
    student = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    one = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert KL(temperature=1)(student, teacher).item() == pytest.approx(one / 2, rel=1e-6)


def test_kl_diverges_from_the_teacher_and_not_from_the_student():
    student = torch.tensor([[0.0, 0.0]])
    teacher = torch.tensor([[0.0, math.log(3)]])
    one = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert KL(temperature=1)(student, teacher).item() == pytest.approx(one, rel=1e-6)


def test_kl_softens_both_by_the_temperature_and_multiplies_by_its_square():
    student, teacher = torch.tensor([[0.0, 2 * math.log(3)]]), torch.tensor([[0.0, 0.0]])
    one = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert KL(temperature=2)(student, teacher).item() == pytest.approx(4 * one, rel=1e-6)


def test_kl_of_a_map_is_the_mean_over_its_positions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 4, 4, generator=generator)  # 3 samples, 5 classes
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    assert KL()(student, teacher).item() == pytest.approx(KL()(*flat).item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_kl_refuses_a_temperature_that_is_not_over_zero(temperature):
    with pytest.raises(ValueError, match="temperature must be over 0"):
        KL(temperature=temperature)


def test_kl_of_half_precision_logits_is_computed_in_float32():
    student, teacher = torch.tensor([[0.0, 1e-3]]), torch.tensor([[0.0, 0.0]])
    half = KL()(student.half(), teacher.half()).item()
    assert half == pytest.approx(KL()(student.half().float(), teacher).item(), rel=1e-6)


def test_feature_mse_is_the_mean_of_the_squared_differences():
    student, teacher = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[0.0, 2.0], [5.0, 1.0]]),
    )
    assert FeatureMSE()(student, teacher).item() == (1 + 0 + 4 + 9) / 4


def test_feature_mse_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\).*protect this layer"):
        FeatureMSE()(torch.zeros(2, 3), torch.zeros(2, 4))
