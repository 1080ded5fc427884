"""Which of several processes speaks and writes, and where they meet and part."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only

from slimkit.errors import SlimkitError


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


def nothing(_line: str) -> None:
    """Says nothing: only the first process speaks."""


def join(accelerator: str) -> None:
    """Meet the others now where torchrun or srun has started all at once; Lightning does it later.

    Processes that Lightning starts itself come when the first one trains, and find its folders.

    Raises:
        SlimkitError: the SLURM job has several tasks that Lightning or slimkit cannot use.
    """
    slurm = None if dist.is_torchelastic_launched() else _slurm()
    if dist.is_initialized() or not (slurm or dist.is_torchelastic_launched()):
        return
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    if on_gpu:
        torch.cuda.set_device(slurm.local_rank() if slurm else int(os.environ["LOCAL_RANK"]))
    kind = "nccl" if on_gpu else "gloo"
    if slurm is None:
        dist.init_process_group(kind)
        return
    where = f"tcp://{slurm.main_address}:{slurm.main_port}"
    dist.init_process_group(kind, where, rank=slurm.global_rank(), world_size=slurm.world_size())


def _slurm() -> SLURMEnvironment | None:
    """SLURM's word on the processes, if it has started several."""
    interactive = SLURMEnvironment.job_name() in ("bash", "interactive")  # Lightning sees none
    if interactive or int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return None
    if "SLURM_STEP_ID" not in os.environ:
        raise SlimkitError(
            f"this SLURM job has {os.environ['SLURM_NTASKS']} tasks, and slimkit was started in "
            "one process: start it with srun, or ask for one task"
        )
    try:
        return SLURMEnvironment()
    except RuntimeError as error:
        raise SlimkitError(f"Lightning: {error}") from error


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
