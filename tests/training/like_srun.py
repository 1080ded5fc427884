"""Starts a command in two processes with the variables that SLURM's srun gives them.

python like_srun.py COMMAND ...
"""

import os
import socket
import subprocess
import sys


def main(command: list[str]) -> None:
    """Run both; exits with 1 if either failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "slimkit",
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **both, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    sys.exit(any([one.wait() for one in started]))


if __name__ == "__main__":
    main(sys.argv[1:])
