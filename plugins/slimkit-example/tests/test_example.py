import torch
from slimkit_example.criterion import FourthPower
from slimkit_example.loss import FeatureL1
from slimkit_example.quantizer import LastBatch

from slimkit.interfaces import Grid, Layer


def test_score_is_the_weight_to_the_power():
    layer = Layer("conv.weight", torch.tensor([[1.0, -2.0]]))
    assert FourthPower().score(layer).tolist() == [[1.0, 16.0]]


def test_only_the_last_batch_counts():
    quantizer = LastBatch(Grid(bits=8, signed=False, symmetric=False))
    quantizer.observe(torch.tensor([0.0, 1000.0]))
    quantizer.observe(torch.tensor([0.0, 255.0]))
    scale, zero_point = quantizer.qparams()
    assert (scale.item(), zero_point.item()) == (1.0, 0)


def test_loss_is_the_mean_absolute_difference():
    loss = FeatureL1()(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    assert loss.item() == 1.5
