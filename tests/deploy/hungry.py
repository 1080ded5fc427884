"""Runtimes that need memory, fail, crash or hang; in a module that another process can import."""

from __future__ import annotations

import os
import signal
import time

from slimkit.builtin.backends.reference import Reference
from slimkit.interfaces import Backend

MIB = 2**20


class Hungry(Backend):
    """Holds as many MiB while it runs as its file says."""

    def compile(self, deployable, directory):
        raise NotImplementedError

    def load(self, directory, threads=1):
        size = int((directory / "size").read_text())

        def run(*inputs):
            held = bytearray(size * MIB)
            held[::1024] = b"1" * len(held[::1024])
            return [inputs[0] + len(held)]

        return run


class Crashing(Hungry):
    """Ends the process."""

    def load(self, directory, threads=1):
        if (directory / "size").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        raise FileNotFoundError


class Hanging(Hungry):
    """Never comes back."""

    def load(self, directory, threads=1):
        return lambda *inputs: time.sleep(60)


class HungryReference(Reference):
    """Runs the program and holds 50 MiB beside."""

    def load(self, directory, threads=1):
        run, held = super().load(directory, threads), bytearray(50 * MIB)
        held[::1024] = b"1" * len(held[::1024])
        return lambda *inputs: run(*inputs) if held else []
