"""The CIFAR-10 benchmark: its networks are the published ones, its data what it says."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the CIFAR-10 benchmark reads its images with Pillow")

from benchmarks.cifar10 import data, models
from slimkit.errors import SlimkitError

ROOT = Path(os.environ.get("SLIMKIT_DATA") or Path(__file__).parents[2] / "shared/data").resolve()

needs_data = pytest.mark.skipif(
    not (ROOT / "cifar10").is_dir(),
    reason=f"needs the CIFAR-10 sheets and weights in {ROOT} (set SLIMKIT_DATA)",
)


@pytest.fixture(autouse=True)
def data_root(monkeypatch):
    monkeypatch.setenv("SLIMKIT_DATA", str(ROOT))


def accuracy(model, loader, images):
    model.eval()
    right = []
    with torch.no_grad():
        for x, y in loader:
            right.append((model(x).argmax(1) == y).float())
            if sum(map(len, right)) >= images:
                break
    return torch.cat(right)[:images].mean().item()


@needs_data
@pytest.mark.parametrize("depth", [20, 56])
def test_a_pretrained_network_gives_the_reference_outputs(depth):
    reference = np.load(ROOT / f"reference/cifar10_resnet{depth}.npz")
    model = getattr(models, f"pretrained_resnet{depth}")().eval()
    with torch.no_grad():
        output = model(data.normalise(torch.from_numpy(reference["input"])))
    torch.testing.assert_close(output, torch.from_numpy(reference["output"]), atol=1e-4, rtol=0)


@needs_data
def test_resnet56_recognises_the_test_images():
    loader = data.Cifar10(batch_size=100).test_dataloader()
    assert accuracy(models.pretrained_resnet56(), loader, 200) == pytest.approx(0.926, abs=0.04)


@needs_data
def test_a_batch_is_normalised_in_channels_last_memory():
    images, labels = next(iter(data.Cifar10(train_images=1000).train_dataloader()))
    assert images.shape == (128, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64


@needs_data
def test_the_last_training_images_are_held_out():
    cifar = data.Cifar10(augment=False, val_images=1500, train_images=2000)
    assert len(cifar.train_dataloader().dataset) == 2000
    held_out = cifar.val_dataloader().dataset
    assert len(held_out) == 1500
    labels = np.load(ROOT / "cifar10/labels.npz")["train"]
    assert held_out.labels.tolist() == labels[-1500:].tolist()


@needs_data
def test_the_same_seed_gives_the_same_augmented_batches():
    def first_batches(seed):
        loader = data.Cifar10(train_images=1000, seed=seed).train_dataloader()
        return [next(iter(loader))[0], next(iter(loader))[0]]

    once, again, other = first_batches(0), first_batches(0), first_batches(1)
    assert torch.equal(torch.cat(once), torch.cat(again))
    assert not torch.equal(once[0], once[1])
    assert not torch.equal(once[0], other[0])


def test_an_augmented_image_is_a_piece_of_the_padded_image():
    pixels = torch.randint(1, 256, (16, 8, 8, 3), dtype=torch.uint8)
    moved = data.crop_and_flip(pixels, torch.Generator().manual_seed(0), border=2)
    padded = torch.zeros(16, 12, 12, 3, dtype=torch.uint8)
    padded[:, 2:10, 2:10] = pixels
    mirrored = 0
    for image, whole in zip(moved, padded, strict=True):
        pieces = [whole[r : r + 8, c : c + 8] for r in range(5) for c in range(5)]
        plain = any(torch.equal(image, piece) for piece in pieces)
        flipped = any(torch.equal(image, piece.flip(1)) for piece in pieces)
        assert plain or flipped
        mirrored += flipped
    assert 0 < mirrored < 16


def test_normalise_shifts_and_scales_each_colour():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).expand(1, 1, 1, 3)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(data.normalise(pixels).flatten(), torch.tensor(expected))


def test_a_missing_data_folder_is_named(tmp_path, monkeypatch):
    with pytest.raises(SlimkitError, match="no folder 'cifar10' in"):
        data.Cifar10(root=str(tmp_path))
    monkeypatch.delenv("SLIMKIT_DATA")
    with pytest.raises(SlimkitError, match="set SLIMKIT_DATA"):
        data.Cifar10()


def test_overlapping_parts_are_refused(tmp_path):
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(SlimkitError, match="train_images=46000 and val_images=5000 overlap"):
        data.Cifar10(root=str(tmp_path), train_images=46_000)
