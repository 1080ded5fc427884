"""Single weights, blocks and 2:4: what stays, against examples by hand."""

import pytest
import torch
from torch import Tensor, tensor

from slimkit.errors import PruningError
from slimkit.pruning.granularity import choose

AXES = {"w": 1}


def stay(score: Tensor, granularity, ratio, axis=1, **options) -> list:
    return choose({"w": score}, {"w": axis}, granularity, ratio, **options)["w"].int().tolist()


HAND = tensor(
    [
        [8.0, 1.0, 2.0, 7.0, 1.0, 2.0, 3.0, 4.0],
        [5.0, 5.0, 5.0, 5.0, 0.0, 9.0, 0.0, 1.0],
    ]
)


def test_two_of_each_four_stay_in_an_example_by_hand():
    assert stay(HAND, "2:4", 0.5) == [[1, 0, 0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1, 0, 1]]


def test_on_the_way_to_two_of_four_the_least_of_those_that_will_go_are_gone():
    # each tensor has 16 weights, of which 8 will go; a quarter is 4 of them
    assert stay(HAND, "2:4", 0.25) == [[1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1, 0, 1]]


def test_fours_lie_along_the_inputs_of_a_convolution_at_each_position_of_its_kernel():
    score = torch.rand(3, 8, 3, 3)
    kept = choose({"w": score}, AXES, "2:4", 0.5)["w"]
    assert (kept.reshape(3, 2, 4, 3, 3).sum(2) == 2).all()
    fours = (score * kept).reshape(3, 2, 4, 9)
    lost = (score * ~kept).reshape(3, 2, 4, 9)
    smallest_kept = fours.masked_fill(fours == 0, 2).amin(2)
    assert (smallest_kept >= lost.amax(2)).all()


def test_inputs_of_a_transposed_convolution_are_its_first_dimension():
    score = torch.rand(4, 3, 2, 2)
    kept = choose({"w": score}, {"w": 0}, "2:4", 0.5)["w"]
    assert (kept.sum(0) == 2).all()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_the_least_elements_of_all_tensors_together_go(ratio):
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float()
    scores = {"a": order[:20].reshape(4, 5), "b": order[20:].reshape(10, 8)}
    kept = choose(scores, {"a": 1, "b": 1}, "element", ratio)
    assert all(torch.equal(kept[n], scores[n] >= 100 * ratio) for n in scores)


def test_each_tensor_loses_the_same_fraction_where_ranking_is_local():
    scores = {"a": torch.rand(4, 5), "b": 100 + torch.rand(10, 8)}
    kept = choose(scores, {"a": 1, "b": 1}, "element", 0.5, ranking="local")
    assert {n: int(k.sum()) for n, k in kept.items()} == {"a": 10, "b": 40}


def test_no_tensor_loses_more_than_max_ratio():
    scores = {"a": torch.rand(4, 5), "b": 100 + torch.rand(10, 8)}
    kept = choose(scores, {"a": 1, "b": 1}, "element", 0.5, max_ratio=0.6)
    assert {n: int(k.sum()) for n, k in kept.items()} == {"a": 8, "b": 42}


def test_a_ratio_over_max_ratio_is_an_error():
    with pytest.raises(PruningError, match="0.5 cannot be reached: max_ratio .0.2. lets .* 0.2"):
        choose({"w": HAND}, AXES, "element", 0.5, max_ratio=0.2)


def test_blocks_go_by_their_mean_as_a_whole():
    # blocks of 1x4: means 4.5, 2.5 / 5, 2.5; the first of equals goes
    assert stay(HAND, "block", 0.25) == [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8]


def test_blocks_at_the_edges_are_smaller():
    score = tensor([[3.0, 3.0, 1.0], [3.0, 3.0, 1.0], [2.0, 2.0, 9.0]])
    # blocks of 2x2: mean 3 of four, 1 of two, 2 of two, 9 of one
    assert stay(score, "block", 4 / 9, block_size=(2, 2)) == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_never_more_than_the_ratio_goes():
    assert stay(HAND, "block", 0.49) == [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8]


def test_blocks_of_a_convolution_lie_at_one_position_of_the_kernel():
    score = torch.ones(2, 4, 1, 3)
    score[1, :, 0, 2] = 0.5
    kept = choose({"w": score}, AXES, "block", 0.2)["w"]
    assert torch.equal(~kept, score == 0.5)


@pytest.mark.parametrize("granularity", ["element", "block", "2:4"])
def test_the_dead_stay_dead_as_more_goes(granularity):
    generator = torch.Generator().manual_seed(3)
    kept = torch.ones(4, 8, 3, dtype=torch.bool)
    for ratio in (0.1, 0.3, 0.5):
        score = torch.rand(4, 8, 3, generator=generator).masked_fill(~kept, -1.0)
        now = choose({"w": score}, AXES, granularity, ratio)["w"]
        assert not (now & ~kept).any()
        kept = now
    assert kept.float().mean() == 0.5
