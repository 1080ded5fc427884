"""Batches go through hooks in Lightning's order: before the move, the move, behind it."""

from __future__ import annotations

import pytorch_lightning as pl

from slimkit.training.transferring import Transferred


class Hooked(pl.LightningModule):
    def on_before_batch_transfer(self, batch: list[str], dataloader_idx: int) -> list[str]:
        return [*batch, f"before {dataloader_idx}"]

    def on_after_batch_transfer(self, batch: list[str], dataloader_idx: int) -> list[str]:
        return [*batch, f"after {dataloader_idx}"]


class Data(pl.LightningDataModule):
    def on_after_batch_transfer(self, batch: list[str], dataloader_idx: int) -> list[str]:
        return [*batch, f"the data's {dataloader_idx}"]


def moved(batch: list[str]) -> list[str]:
    return [*batch, "moved"]


def test_the_move_is_between_the_hooks() -> None:
    (batch,) = Transferred([["batch"]], None, Hooked(), move=moved)
    assert batch == ["batch", "before 0", "moved", "after 0"]


def test_the_data_modules_hook_takes_the_modules_place() -> None:
    (batch,) = Transferred([["batch"]], Data(), Hooked(), move=moved)
    assert batch == ["batch", "before 0", "moved", "the data's 0"]


def test_loaders_come_side_by_side_or_in_turn() -> None:
    loaders = [[1, 2], [3]]
    assert [*Transferred(loaders, None, None)] == [[1, 3], [2, 3]]
    assert [*Transferred(loaders, None, None, in_turn=True)] == [1, 2, 3]
