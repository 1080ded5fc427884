"""ExecuTorch on the CPU: one ``.pte`` file in float or int8, computed by XNNPACK."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from slimkit.errors import ExportError
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme
from slimkit.trial import Trial
from slimkit_executorch import inspection, lowering
from slimkit_executorch.runtime import Loaded, bindings

FILE = "model.pte"


class ExecuTorch(Backend):
    """An ExecuTorch program whose convolutions, linear layers, sums and products are int8.

    XNNPACK computes an operation on integers where all that it reads and gives is rounded
    (https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-overview.html): int8 with
    a zero point per tensor, weights int8 per output channel, biases int32. Sums become the next
    tensor's integers by one float32 factor, half to even; bounds of a ReLU are applied to the
    integers. A function of single values between two roundings (hard-swish, sigmoid, GELU) becomes
    a table of 256 bytes when the file is opened. What else XNNPACK has in float only (SiLU, average
    pooling, softmax) reads and gives float, with conversions around it; what it lacks runs in
    ExecuTorch's portable kernels, one thread and slowly. Of the last layers, which give float,
    linear ones and whole convolutions are int8 as well, others float.

    Integer convolutions compute 16 channels at once with AVX-512: the 17th costs as much as 16.
    """

    channel_multiple = 16
    least_db = 60.0  # twelve blocks with GELU by tanh, which XNNPACK approximates, keep 75
    scheme: ClassVar[Scheme] = Scheme(
        activations=Grid(bits=8, signed=True, symmetric=False),
        weights=Grid(bits=8, per_channel=True),
        operations=frozenset(
            {"conv1d", "conv2d", "linear", "add", "mul", "sub", "mean", "adaptive_avg_pool2d"}
        ),
        placement="tensors",
        keeps=frozenset(
            {"max_pool2d", "flatten", "reshape", "view", "permute", "transpose", "t", "mT", "T"}
            | {"squeeze", "unsqueeze", "dropout", "dropout2d", "contiguous", "clone", "chunk"}
            | {"split", "getitem", "narrow", "pad", "swapaxes", "movedim", "detach", "unflatten"}
            | {"interpolate"}
        ),
        fuses=frozenset({"batch_norm", "relu", "relu6", "hardtanh", "clamp", "clip"}),
        tables=frozenset({"hardswish", "sigmoid", "tanh", "gelu", "leaky_relu"}),
        bias_bits=32,
        arithmetic="requantize",
    )

    def __init__(self) -> None:
        self._trial = Trial[bytes]()

    def check(self, deployable: Deployable) -> list[str]:
        """What ExecuTorch or XNNPACK says against this program (it is compiled and run once)."""

        def tried() -> bytes:
            data = lowering.lowered(deployable)
            lowering.try_out(data, deployable)
            return data

        return self._trial.refused(deployable, tried)

    def remarks(self, deployable: Deployable) -> list[str]:
        """The operators that run outside XNNPACK, in float and in int8."""
        data = self._trial.look(deployable, lambda: lowering.lowered(deployable))
        return inspection.portable(inspection.steps(data, FILE))

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.pte``."""
        data = self._trial.take(deployable) or lowering.lowered(deployable)
        (directory / FILE).write_bytes(data)

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Open the program on `threads` threads.

        ExecuTorch has one pool of threads a process. Where programs with several numbers of them
        run by turns, the pool is replaced and the program is loaded again at each turn.
        """
        bindings()  # also where there is no file: what it costs is the runtime's, not the file's
        return Loaded(_read(directory), FILE, threads)

    def operators(self, directory: Path) -> dict[str, int]:
        """XNNPACK's operators by kind, ``int8`` behind integer ones, and portable kernels by name.

        ``Quantize`` and ``Dequantize`` convert between float and int8.
        """
        return inspection.counted(inspection.steps(_read(directory), FILE))

    def profile(self, directory: Path, inputs: tuple[Tensor, ...]) -> dict[str, float]:
        """Times by ExecuTorch's own events, to the microsecond: the median of 20 runs."""
        return inspection.timed(_read(directory), FILE, inputs)


def _read(directory: Path) -> bytes:
    path = directory / FILE
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing: export again") from error
