"""Which of several processes speaks and writes, and where they meet and part."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_only


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


def nothing(_line: str) -> None:
    """Says nothing: only the first process speaks."""


def join(accelerator: str) -> None:
    """Meet the others now where torchrun has started them all at once; Lightning would do it later.

    Processes that Lightning starts itself come when the first one trains, and find its folders.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")


def meet() -> None:
    """Wait for the others, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def part() -> None:
    """Leave the others once all have come here: what follows is the first process's alone.

    A process that ends without may be aborted by its gloo threads
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
