"""LightningModules in the manner of public examples, and data that each of them takes.

None of them knows slimkit: own steps, losses that are dictionaries, lists of images, two
optimizers stepped by hand, compiled parts, a frozen backbone, an average of itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import normal
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex


def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
    )


def backbone() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 16), conv(16, 24, 2), conv(24, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class Classifier(pl.LightningModule):
    """The image classifier of tutorials: metrics by stage, hyper-parameters, OneCycleLR."""

    def __init__(self, lr: float = 0.05, classes: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(1, 3, 16, 16)
        self.model = nn.Sequential(backbone(), nn.Linear(32, classes))
        metrics = MetricCollection({"acc": Accuracy(task="multiclass", num_classes=classes)})
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.model(x), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.nll_loss(logits, y)
        self.log("train_loss", loss)
        self.log_dict(self.train_metrics(logits, y))
        return loss

    def evaluate(self, batch: Any, stage: str) -> None:
        x, y = batch
        logits = self(x)
        self.log(f"{stage}_loss", F.nll_loss(logits, y), prog_bar=True)
        self.val_metrics(logits.argmax(1), y)
        self.log_dict(self.val_metrics)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class UNet(nn.Module):
    """Two levels, transposed convolution, skip connections by concatenation."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first, self.down = conv(3, 16), nn.Sequential(nn.MaxPool2d(2), conv(16, 32))
        self.bottom = nn.Sequential(nn.MaxPool2d(2), conv(32, 48))
        self.up = nn.ConvTranspose2d(48, 32, 2, 2)
        self.join = conv(64, 32)
        self.last = conv(48, 16)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.down(a)
        c = self.join(torch.cat([self.up(self.bottom(b)), b], 1))
        c = F.interpolate(c, size=a.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(self.last(torch.cat([c, a], 1)))


class Segmenter(pl.LightningModule):
    """Semantic segmentation with two losses and a cosine schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()
        self.iou = MulticlassJaccardIndex(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def losses(self, batch: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        image, mask = batch["image"].float(), batch["mask"].long()
        out = self.forward(image)
        p, hot = out.softmax(1), F.one_hot(mask, 3).movedim(-1, 1)
        dice = 1 - 2 * (p * hot).sum() / (p.sum() + hot.sum())
        return {"ce": F.cross_entropy(out, mask), "dice": dice}, out, mask

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses, _, _ = self.losses(batch)
        loss = sum(losses.values())
        self.log_dict({f"train/{k}": v for k, v in losses.items()})
        return {"loss": loss, "ce": losses["ce"].detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses, out, mask = self.losses(batch)
        self.iou(out.argmax(1), mask)
        self.log("val_iou", self.iou, on_epoch=True)
        return {"val_loss": sum(losses.values())}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)]


class Boxes(nn.Module):
    """A detector as torchvision's are called: losses where it trains, detections where not."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16, 2), conv(16, 32, 2))
        self.neck = conv(32, 32)
        self.cls, self.reg = nn.Conv2d(32, classes, 1), nn.Conv2d(32, 4, 1)

    def forward(self, images: Any, targets: Any = None) -> Any:
        x = torch.stack(images) if isinstance(images, list | tuple) else images
        feature = self.neck(self.body(x))
        logits, boxes = self.cls(feature), self.reg(feature)
        if targets is None:
            return {"logits": logits, "boxes": boxes}
        labels = torch.stack([t["labels"][0] for t in targets])
        wanted = torch.stack([t["boxes"][0] for t in targets])
        return {
            "loss_classifier": F.cross_entropy(logits.mean((2, 3)), labels),
            "loss_box_reg": F.smooth_l1_loss(boxes.mean((2, 3)), wanted),
        }


class Detector(pl.LightningModule):
    """Lists of images and of target dictionaries; the network gives its losses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Boxes()

    def forward(self, x: Any) -> Any:
        self.model.eval()
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        images, targets = batch
        loss_dict = self.model(images, targets)
        loss = sum(loss_dict.values())
        self.log_dict({k: v.detach() for k, v in loss_dict.items()}, batch_size=len(images))
        return {"loss": loss, "log": {k: v.detach() for k, v in loss_dict.items()}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = batch
        found = self.model(images)["logits"].mean((2, 3)).argmax(1)
        right = found == torch.stack([t["labels"][0] for t in targets])
        self.log("val_hits", right.float().mean(), batch_size=len(images))

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.0005)
        return {"optimizer": optimizer}


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(8, 32),
            nn.LeakyReLU(0.2),
            nn.Linear(32, 64),
            nn.BatchNorm1d(64),
            nn.LeakyReLU(0.2),
            nn.Linear(64, 3 * 16 * 16),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.model(z).view(z.size(0), 3, 16, 16)


class GAN(pl.LightningModule):
    """Two networks, two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = Generator()
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(768, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1), nn.Sigmoid()
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(images.shape[0], 8).type_as(images)
        valid = torch.ones(images.size(0), 1).type_as(images)

        self.toggle_optimizer(optimizer_g)
        g_loss = F.binary_cross_entropy(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real = F.binary_cross_entropy(self.discriminator(images), valid)
        fake = F.binary_cross_entropy(self.discriminator(self(z).detach()), 1 - valid)
        d_loss = (real + fake) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def configure_optimizers(self) -> Any:
        g = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        return [g, d], []


class Accumulating(Classifier):
    """Steps by hand, over two batches, with clipping and a schedule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt, schedule = self.optimizers(), self.lr_schedulers()
        x, y = batch
        loss = F.nll_loss(self(x), y) / 2
        self.manual_backward(loss)
        if (batch_idx + 1) % 2 == 0:
            self.clip_gradients(opt, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            opt.step()
            opt.zero_grad()
            schedule.step()


class Backward(Accumulating):
    """Goes round `manual_backward`."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt = self.optimizers()
        x, y = batch
        opt.zero_grad()
        F.nll_loss(self(x), y).backward()
        opt.step()


class Compiled(Classifier):
    """A compiled part inside."""

    def __init__(self, backend: str = "eager") -> None:
        super().__init__()
        self.model = torch.compile(self.model, backend=backend)


class Transfer(pl.LightningModule):
    """A pretrained backbone, frozen and in eval mode, under a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = backbone()
        for p in self.feature_extractor.parameters():
            p.requires_grad = False
        self.classifier = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.feature_extractor.eval()
        with torch.no_grad():
            representations = self.feature_extractor(x)
        return self.classifier(representations)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.classifier.parameters(), lr=1e-3)


class Contrastive(pl.LightningModule):
    """Two views of each image and a projection head, as SimCLR."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = backbone()
        self.projection = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (one, two), _ = batch
        z1, z2 = (F.normalize(self.projection(self.encoder(x)), dim=1) for x in (one, two))
        return F.cross_entropy(z1 @ z2.T / 0.1, torch.arange(len(z1), device=self.device))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-4)


class Momentum(pl.LightningModule):
    """A target network that is an average of the online one, as BYOL."""

    def __init__(self) -> None:
        super().__init__()
        self.online = backbone()
        self.target = copy.deepcopy(self.online)
        for p in self.target.parameters():
            p.requires_grad = False
        self.predictor = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.online(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (one, two), _ = batch
        with torch.no_grad():
            wanted = self.target(two)
        return -F.cosine_similarity(self.predictor(self(one)), wanted, dim=-1).mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for p, q in zip(self.online.parameters(), self.target.parameters(), strict=True):
                q.mul_(0.99).add_(p, alpha=0.01)

    def configure_optimizers(self) -> Any:
        learning = [*self.online.parameters(), *self.predictor.parameters()]
        return torch.optim.Adam(learning, lr=1e-3)


class Tagger(pl.LightningModule):
    """A small transformer whose forward takes keyword arguments and gives a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 4)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        x = self.norm(x + self.down(F.gelu(self.up(x))))
        logits = self.head(x.mean(1))
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits, labels)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self(**batch)["loss"]
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch)["loss"]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Autoencoder(pl.LightningModule):
    """Lightning's first example: no forward of its own, the training step calls both parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3 * 16 * 16))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        x = x.view(x.size(0), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def images(n: int = 16) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % 4
    return normal(n, 3, 16, 16) + 2 * normal(4, 3, 1, 1, seed=1)[labels], labels


def _pairs() -> list[Any]:
    return list(zip(*images(), strict=True))


def _masks() -> list[Any]:
    return [{"image": x, "mask": (x[0] > 0).long()} for x, _ in _pairs()]


def _targets() -> list[Any]:
    box = torch.tensor([[0.1, 0.2, 0.5, 0.6]])
    return [(x, {"boxes": box, "labels": y[None] % 3}) for x, y in _pairs()]


def _views() -> list[Any]:
    return [((x, x + 0.1), y) for x, y in _pairs()]


def _words() -> list[Any]:
    tokens = torch.arange(16 * 6).view(16, 6) * 7 % 20
    return [{"input_ids": t, "labels": y} for t, (_, y) in zip(tokens, _pairs(), strict=True)]


def lists(batch: list[Any]) -> tuple[Any, ...]:
    """The collate function of detection examples."""
    return tuple(zip(*batch, strict=True))


class Loaded(pl.LightningDataModule):
    """16 samples in batches of 8, to train and to validate."""

    def __init__(self, samples: Callable[[], list[Any]], collate: Any = None) -> None:
        super().__init__()
        self.samples, self.collate = samples(), collate

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, 8, collate_fn=self.collate)

    def val_dataloader(self) -> Any:
        return DataLoader(self.samples, 8, collate_fn=self.collate)


def pairs() -> Loaded:
    return Loaded(_pairs)


def masks() -> Loaded:
    return Loaded(_masks)


def targets() -> Loaded:
    return Loaded(_targets, lists)


def views() -> Loaded:
    return Loaded(_views)


def words() -> Loaded:
    return Loaded(_words)
