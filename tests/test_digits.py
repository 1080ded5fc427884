"""The shipped demo: its data are split as promised and its model learns them."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional

from slimkit.demo.digits import digits, resnet
from slimkit.errors import SlimkitError

PARTS = ["train", "val", "test"]


@pytest.fixture(scope="module")
def data():
    return digits()


def test_a_batch_holds_normalised_images_and_labels(data):
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert labels.shape == (64,)
    assert labels.dtype == torch.int64


def test_the_parts_together_are_the_whole_set_once(data):
    from sklearn.datasets import load_digits

    parts = torch.cat([getattr(data, part).tensors[0] for part in PARTS])
    ours = (parts * 16).flatten(1).int().tolist()
    theirs = load_digits().data.astype(int).tolist()
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize(("part", "size"), [("train", 1078), ("val", 359), ("test", 360)])
def test_every_part_has_its_share_of_every_digit(data, part, size):
    labels = getattr(data, part).tensors[1]
    assert len(labels) == size
    whole = torch.cat([getattr(data, each).tensors[1] for each in PARTS])
    expected = whole.bincount(minlength=10) * size / len(whole)
    assert (labels.bincount(minlength=10) - expected).abs().max() <= 1


def labels_of(loader):
    return torch.cat([labels for _, labels in loader]).tolist()


def test_the_same_seed_gives_the_same_order_in_every_epoch():
    first, second = digits(seed=1).train_dataloader(), digits(seed=1).train_dataloader()
    epochs = [labels_of(first), labels_of(first)]
    assert epochs == [labels_of(second), labels_of(second)]
    assert epochs[0] != epochs[1]


def test_another_seed_gives_another_split():
    assert not torch.equal(digits(seed=0).test.tensors[0], digits(seed=1).test.tensors[0])


def test_missing_scikit_learn_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SlimkitError, match=r"pip install 'slimkit\[demo\]'"):
        digits()


def test_the_seed_of_torch_fixes_the_weights_of_the_model():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(resnet().state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_one_epoch_teaches_the_model_most_digits():
    torch.manual_seed(0)
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = digits(batch_size=16)
    for images, labels in data.train_dataloader():
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float() for x, y in data.val_dataloader()]
    assert torch.cat(right).mean() > 0.7  # chance is 0.1


def test_the_recipe_beside_the_demo_names_its_functions():
    import slimkit.demo

    recipe = yaml.safe_load((Path(slimkit.demo.__file__).parent / "recipe.yaml").read_text())
    assert recipe["model"] == f"{resnet.__module__}:{resnet.__name__}"
    assert recipe["data"] == f"{digits.__module__}:{digits.__name__}"
