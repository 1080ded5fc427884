"""The pretrained networks with images to calibrate on, images to test on, and the task's metric.

Calibration images are never test images: CIFAR-10 training images, the ImageNet sample, COCO
train2017, SST-2 training phrases.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import models as cifar10_models
from cifar10.data import MEAN, STD, Cifar10
from PIL import Image
from torch import Tensor, nn

from benchmarks.folder import data_folder
from benchmarks.models import (
    fastestdet,
    mobilenet_v1,
    resnet8,
    squeezenet,
    sst2_transformer,
    yolox_nano,
)

CROP = 224
LENGTH = 64  # tokens of a phrase


@dataclass(frozen=True)
class Task:
    """One network and its data.

    Args:
        name: of the network.
        model: in evaluation mode.
        calibration: inputs to calibrate on, (N, ...).
        test: inputs to test on, (N, ...).
        score: the metric of the network's outputs for all of `test`, flat and in order.
        metric: its name.
    """

    name: str
    model: nn.Module
    calibration: Tensor
    test: Tensor
    score: Callable[[list[Tensor]], float]
    metric: str

    @property
    def example(self) -> Tensor:
        """One sample."""
        return self.test[:1]

    def batches(self, size: int = 16) -> list[Tensor]:
        """The calibration inputs in batches."""
        return list(self.calibration.split(size))

    def of(self, call: Callable[..., Any]) -> float:
        """The metric of something that is called like the model."""
        return self.score(outputs(call, self.test))


@torch.no_grad()
def outputs(call: Callable[..., Any], inputs: Tensor, size: int = 32) -> list[Tensor]:
    """Flat outputs for all `inputs`, computed batch by batch."""
    columns: list[list[Tensor]] = []
    for part in inputs.split(size):
        columns.append(torch.utils._pytree.tree_leaves(call(part)))
    return [torch.cat(column) for column in zip(*columns, strict=True)]


def top1(labels: Tensor) -> Callable[[list[Tensor]], float]:
    """Fraction of the labels that are the largest class."""
    return lambda found: (found[0].argmax(1) == labels).double().mean().item()


def cifar(root: str, name: str, calibration: int = 512) -> Task:
    """``resnet20``, ``resnet56`` (normalised input), ``resnet8`` and ``resnet8_wide`` (raw)."""
    data = Cifar10(root, train_images=calibration, augment=False)
    kept = torch.cat([x for x, _ in data.train_dataloader()])
    pairs = list(data.test_dataloader())
    images, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    if name.startswith("resnet8"):
        model: nn.Module = (
            resnet8.pretrained_wide(root) if "wide" in name else resnet8.pretrained(root)
        )
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        kept, images = ((x * std + mean).mul(255).round() for x in (kept, images))
    else:
        weights = data_folder(root) / f"weights/cifar10_{name}.safetensors"
        model = getattr(cifar10_models, name)(str(weights))
    return Task(name, model.eval(), kept.contiguous(), images.contiguous(), top1(labels), "top-1")


def _members(archive: Path) -> dict[str, Image.Image]:
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            handle = tar.extractfile(member)
            if handle is not None:
                found[member.name] = Image.open(io.BytesIO(handle.read())).convert("RGB")
    return found


@cache
def _imagenet(root: str, part: str) -> tuple[Tensor, Tensor]:
    """Centre crops (N, 224, 224, 3) uint8 RGB and labels."""
    folder = data_folder(root, "imagenet") / "imagenet"
    labels = {
        x["file"]: x["label"] for x in json.loads((folder / f"{part}.json").read_text())["images"]
    }
    crops, known = [], []
    for name, image in _members(folder / f"{part}.tar").items():
        left, top = ((side - CROP) // 2 for side in image.size)
        crops.append(np.asarray(image.crop((left, top, left + CROP, top + CROP))))
        known.append(labels[name])
    return torch.from_numpy(np.stack(crops)), torch.tensor(known)


def imagenet(root: str, name: str, calibration: int = 256) -> Task:
    """``mobilenet_v1`` or ``squeezenet``: sample images to calibrate, NIPS 2017 images to test."""
    module = {"mobilenet_v1": mobilenet_v1, "squeezenet": squeezenet}[name]
    pixels, _ = _imagenet(root, "imagenet_sample_256")
    every = max(1, len(pixels) // calibration)
    tested, labels = _imagenet(root, "nips17_256")
    kept = module.prepare(pixels[::every][:calibration]).contiguous()
    return Task(
        name,
        module.pretrained(root).eval(),
        kept,
        module.prepare(tested).contiguous(),
        top1(labels),
        "top-1",
    )


def imagenet_labelled(root: str) -> tuple[Tensor, Tensor]:
    """The ImageNet sample as `mobilenet_v1` takes it, and its labels, for criteria that train."""
    pixels, labels = _imagenet(root, "imagenet_sample_256")
    return mobilenet_v1.prepare(pixels).contiguous(), labels


def _coco(root: str, part: str) -> tuple[dict[str, Any], dict[int, Image.Image]]:
    folder = data_folder(root, "coco") / "coco"
    truth = json.loads((folder / f"coco_{part}_instances.json").read_text())
    images = _members(folder / f"coco_{part}.tar")
    return truth, {x["id"]: images[x["file_name"]] for x in truth["images"]}


def detector(root: str, name: str) -> Task:
    """``yolox_nano`` or ``fastestdet``: COCO train2017 to calibrate, val2017 to test."""
    yolox = name == "yolox_nano"
    pixels = _letterboxed if yolox else _stretched
    module = yolox_nano if yolox else fastestdet
    _, kept = _coco(root, "train50")
    truth, tested = _coco(root, "val128")
    shapes = [image.size for image in tested.values()]

    def inputs(images: dict[int, Image.Image]) -> Tensor:
        stacked = np.stack([pixels(image) for image in images.values()])
        return module.prepare(torch.from_numpy(stacked)).contiguous()

    decode = _decode_yolox if yolox else _decode_fastestdet

    def score(found: list[Tensor]) -> float:
        detections = []
        for identity, shape, row in zip(tested, shapes, found[0], strict=True):
            boxes, scores = decode(row.double(), shape)
            edges = torch.tensor([*shape, *shape], dtype=boxes.dtype)
            boxes = torch.minimum(boxes.clamp(min=0), edges)
            detections += _suppressed(identity, boxes, scores, truth, 0.65 if yolox else 0.45)
        return average_precision(truth, detections)

    return Task(name, module.pretrained(root).eval(), inputs(kept), inputs(tested), score, "AP")


def _letterboxed(image: Image.Image, side: int = 416) -> np.ndarray:
    ratio = min(side / image.width, side / image.height)
    size = (int(image.width * ratio), int(image.height * ratio))
    canvas = np.full((side, side, 3), 114, np.uint8)
    canvas[: size[1], : size[0]] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    return canvas[..., ::-1].copy()


def _stretched(image: Image.Image, side: int = 352) -> np.ndarray:
    """Bilinear without antialiasing, pixel centres aligned, as OpenCV resizes."""
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    x = nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()[..., ::-1].copy()


def _decode_yolox(rows: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Corners in the image's pixels (n, 4) and scores (n, classes)."""
    grids, strides = [], []
    for stride in (8, 16, 32):
        n = 416 // stride
        y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        grids.append(torch.stack([x, y], -1).reshape(-1, 2))
        strides.append(torch.full((n * n, 1), stride))
    grid, stride = torch.cat(grids), torch.cat(strides)
    centre = (rows[:, :2] + grid) * stride
    half = rows[:, 2:4].clamp(max=20).exp() * stride / 2
    ratio = min(416 / shape[0], 416 / shape[1])
    return torch.cat([centre - half, centre + half], 1) / ratio, rows[:, 4:5] * rows[:, 5:]


def _decode_fastestdet(maps: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    side = maps.shape[-1]
    rows = maps.flatten(1).T
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    grid = torch.stack([x, y], -1).reshape(-1, 2)
    size = torch.tensor(shape, dtype=rows.dtype)
    centre = (rows[:, 1:3].tanh() + grid) / side * size
    half = rows[:, 3:5].sigmoid() * size / 2
    scores = rows[:, :1].clamp(min=0) ** 0.6 * rows[:, 5:].clamp(min=0) ** 0.4
    return torch.cat([centre - half, centre + half], 1), scores


def _suppressed(
    image: int,
    boxes: Tensor,
    scores: Tensor,
    truth: dict[str, Any],
    overlap: float,
    most: int = 100,
) -> Iterator[dict[str, Any]]:
    """Detections over 0.001 after non-maximum suppression in each class, the best 100."""
    categories = sorted(x["id"] for x in truth["categories"])
    where, classes = (scores > 0.001).nonzero(as_tuple=True)
    values = scores[where, classes]
    order = values.argsort(descending=True, stable=True)[:3000]
    b, c, v = boxes[where][order].numpy(), classes[order].numpy(), values[order].numpy()
    apart = b + c[:, None] * 1e5  # boxes of different classes do not meet
    area = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    alive, count = np.ones(len(b), bool), 0
    for i in range(len(b)):
        if not alive[i]:
            continue
        left = b[i]
        yield {
            "image_id": image,
            "category_id": categories[int(c[i])],
            "bbox": [
                float(left[0]),
                float(left[1]),
                float(left[2] - left[0]),
                float(left[3] - left[1]),
            ],
            "score": float(v[i]),
        }
        count += 1
        if count == most:
            return
        low = np.maximum(apart[i, :2], apart[i + 1 :, :2])
        high = np.minimum(apart[i, 2:], apart[i + 1 :, 2:])
        inside = np.clip(high - low, 0, None).prod(1)
        alive[i + 1 :] &= inside / (area[i] + area[i + 1 :] - inside + 1e-9) <= overlap


def average_precision(truth: dict[str, Any], detections: list[dict[str, Any]]) -> float:
    """COCO's AP (IoU 0.50 to 0.95) by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not detections:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        judge = COCOeval(known, known.loadRes(detections), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0])


def sst2(root: str, calibration: int = 512) -> Task:
    """The small transformer: training phrases to calibrate, the test set to test."""
    data = np.load(data_folder(root, "sst2") / "sst2/sst2.npz")

    def padded(split: str) -> Tensor:
        ids, lengths = data[f"{split}_ids"].astype(np.int64), data[f"{split}_len"]
        rows = np.zeros((len(lengths), LENGTH), np.int64)
        at = 0
        for row, n in zip(rows, lengths.astype(int), strict=True):
            row[: min(n, LENGTH)] = ids[at : at + min(n, LENGTH)]
            at += n
        return torch.from_numpy(rows)

    kept = padded("train")[:: max(1, 67_348 // calibration)][:calibration]
    labels = torch.from_numpy(data["test_y"].astype(np.int64))
    return Task(
        "sst2",
        sst2_transformer.pretrained(root).eval(),
        kept,
        padded("test"),
        top1(labels),
        "top-1",
    )


NAMES = (
    "resnet20",
    "resnet56",
    "resnet8",
    "resnet8_wide",
    "mobilenet_v1",
    "squeezenet",
    "yolox_nano",
    "fastestdet",
    "sst2",
)


def task(name: str, root: str) -> Task:
    """The task of a network by name."""
    if name.startswith("resnet"):
        return cifar(root, name)
    if name in ("mobilenet_v1", "squeezenet"):
        return imagenet(root, name)
    if name in ("yolox_nano", "fastestdet"):
        return detector(root, name)
    if name == "sst2":
        return sst2(root)
    raise ValueError(f"{name} is none of {', '.join(NAMES)}")
