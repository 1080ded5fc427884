import numpy as np
import pytest
import torch
from slimkit_skd.loss import PairWise


def by_numpy(student, teacher):
    """The mean over samples and pairs, pair by pair."""
    squares = []
    for s, t in zip(student, teacher, strict=True):
        places = [x.reshape(len(x), -1).T for x in (s, t)]
        for i in range(len(places[0])):
            for j in range(len(places[0])):
                cosines = [
                    p[i] @ p[j] / np.linalg.norm(p[i]) / np.linalg.norm(p[j]) for p in places
                ]
                squares.append((cosines[0] - cosines[1]) ** 2)
    return np.mean(squares)


def pair(*widths, side=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, width, side, side + 1, generator=generator) for width in widths]


def test_loss_is_the_difference_of_all_cosines():
    student, teacher = pair(5, 8)
    expected = by_numpy(student.double().numpy(), teacher.double().numpy())
    assert PairWise()(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_places_of_four_positions_are_averaged():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, c, 8, 8, generator=generator) for c in (5, 8))
    pooled = [
        x.reshape(3, -1, 4, 2, 4, 2).mean((3, 5)).double().numpy() for x in (student, teacher)
    ]
    assert PairWise(patch=2)(student, teacher).item() == pytest.approx(by_numpy(*pooled), rel=1e-5)


def test_two_places_that_look_alike_to_one_and_opposite_to_the_other():
    alike = torch.tensor([1.0, 1.0]).reshape(1, 1, 1, 2)
    opposite = torch.tensor([1.0, -1.0]).reshape(1, 1, 1, 2)
    # of four pairs, a place with itself twice, two differ by 1 - (-1)
    assert PairWise()(alike, opposite).item() == pytest.approx(2.0)


def test_the_scale_of_a_place_changes_nothing():
    student, teacher = pair(5, 5)
    scaled = student * torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(1)).add(0.1)
    assert PairWise()(scaled, teacher).item() == pytest.approx(
        PairWise()(student, teacher).item(), rel=1e-4
    )


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 4, 4), (2, 3, 4, 5))])
def test_what_is_no_pair_of_maps_is_refused(shapes):
    with pytest.raises(ValueError, match="differ in channels only"):
        PairWise()(*(torch.zeros(shape) for shape in shapes))


def test_a_patch_without_positions_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        PairWise(patch=0)
