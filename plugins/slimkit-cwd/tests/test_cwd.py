import math

import numpy as np
import pytest
import torch
from slimkit_cwd.loss import CWD


def by_numpy(student, teacher, temperature):
    """The mean over samples and channels, channel by channel."""
    total = []
    for s, t in zip(student.reshape(-1, 20), teacher.reshape(-1, 20), strict=True):
        p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (t, s))
        total.append((p * np.log(p / q)).sum())
    return temperature**2 * np.mean(total)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_is_the_divergence_of_each_channels_positions(temperature):
    student, teacher = torch.randn(2, 3, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = by_numpy(student.double().numpy(), teacher.double().numpy(), temperature)
    assert CWD(temperature=temperature)(student, teacher).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_one_channel_of_two_positions():
    student = torch.tensor([[[0.0, math.log(3)]]])
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert CWD(temperature=1)(student, torch.zeros(1, 1, 2)).item() == pytest.approx(divergence)


def test_adding_a_constant_to_a_channel_changes_nothing():
    student, teacher = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    shifted = student + torch.tensor([1.0, -2.0, 3.0]).reshape(1, 3, 1, 1)
    assert CWD()(shifted, teacher).item() == pytest.approx(CWD()(student, teacher).item(), rel=1e-4)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 4), (2, 4, 4))])
def test_what_is_no_pair_of_maps_is_refused(shapes):
    with pytest.raises(ValueError, match="maps of the same shape"):
        CWD()(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_over_zero_is_refused(temperature):
    with pytest.raises(ValueError, match="over 0"):
        CWD(temperature=temperature)
