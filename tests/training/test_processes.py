"""Jobs of SLURM that slimkit or Lightning cannot use are refused before anything is built."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from slimkit.errors import SlimkitError
from slimkit.recipe import Trainer
from slimkit.training.processes import join

TWO = Trainer(accelerator="cpu", devices=2, strategy="ddp")
SRUN = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "slimkit"}


def job(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_one_process_of_a_job_of_two_says_how_to_start_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job(monkeypatch, **SRUN)
    with pytest.raises(SlimkitError, match="has 2 tasks, .* start it with srun"):
        join(TWO)


def test_one_process_that_wants_no_more_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    job(monkeypatch, **SRUN)
    join(Trainer(accelerator="cpu", devices=1))
    join(Trainer())
    assert not dist.is_initialized()


def test_what_lightning_says_of_a_job_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    job(monkeypatch, SLURM_NTASKS="2", SLURM_JOB_NAME="slimkit", SLURM_STEP_ID="0")
    with pytest.raises(SlimkitError, match="Lightning: .*--ntasks-per-node=2"):
        join(TWO)


def test_a_job_of_one_task_and_an_interactive_one_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job(monkeypatch, **{**SRUN, "SLURM_NTASKS": "1"})
    join(TWO)
    job(monkeypatch, **{**SRUN, "SLURM_JOB_NAME": "interactive"})
    join(TWO)
    assert not dist.is_initialized()
