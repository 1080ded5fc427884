"""Which of several processes speaks and writes, and where they meet and part."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only

from slimkit.errors import SlimkitError
from slimkit.recipe import Trainer

_SHELL = "4294967290"  # the step of salloc's interactive shell


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


def nothing(_line: str) -> None:
    """Says nothing: only the first process speaks."""


def join(trainer: Trainer) -> None:
    """Meet the others now where torchrun or srun has started all at once; Lightning does it later.

    Processes that Lightning starts itself come when the first one trains, and find its folders.

    Args:
        trainer: the recipe's, which says whether several processes are wanted, and on what.

    Raises:
        SlimkitError: the SLURM job has several tasks that Lightning or slimkit cannot use.
    """
    if dist.is_initialized():
        return
    slurm = None if dist.is_torchelastic_launched() else _slurm(trainer)
    if not (slurm or dist.is_torchelastic_launched()):
        return
    on_gpu = torch.cuda.is_available() and trainer.accelerator != "cpu"
    if on_gpu:
        local = slurm.local_rank() if slurm else int(os.environ["LOCAL_RANK"])
        alone = torch.cuda.device_count() == 1  # srun --gpus-per-task=1 shows each its own
        torch.cuda.set_device(0 if alone else local)
    kind = "nccl" if on_gpu else "gloo"
    if slurm is None:
        dist.init_process_group(kind)
        return
    where = f"tcp://{slurm.main_address}:{slurm.main_port}"
    dist.init_process_group(kind, where, rank=slurm.global_rank(), world_size=slurm.world_size())


def _slurm(trainer: Trainer) -> SLURMEnvironment | None:
    """SLURM's word on the processes, if it has started several."""
    interactive = SLURMEnvironment.job_name() in ("bash", "interactive")  # Lightning sees none
    if interactive or int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return None
    if os.environ.get("SLURM_STEP_ID", _SHELL) == _SHELL:  # of the job's script, or by hand
        if not _wants_several(trainer):
            return None
        raise SlimkitError(
            f"this SLURM job has {os.environ['SLURM_NTASKS']} tasks, and slimkit was started in "
            "one process: start it with srun --ntasks-per-node=N, or ask for one task"
        )
    try:
        return SLURMEnvironment()
    except RuntimeError as error:
        raise SlimkitError(f"Lightning: {error}") from error


def _wants_several(trainer: Trainer) -> bool:
    given = trainer.arguments
    devices = given.get("devices")
    several = len(devices) > 1 if isinstance(devices, list) else devices not in ("auto", 1, "1")
    return several or given.get("num_nodes", 1) != 1


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
