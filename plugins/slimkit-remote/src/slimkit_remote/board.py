"""Runs a model's files on a board: sent there as text and executed by its Python.

Needs Python 3.8, numpy and one runtime, and nothing of slimkit or torch. It answers requests on
standard input, one after the other, on standard output. A request or an answer is a frame: the
length of a JSON text (4 bytes, big-endian), the length of a body (8 bytes), the text, the body.
Bodies are the bytes of files, or arrays as .npz.

Requests, by their ``do``:

    hello                               -> threads
    send {folder, files: {name: size}}  -> (body: the files)
    open {runtime, threads}             -> opens what was sent
    run                                 -> (body: inputs, and the answer's: outputs)
    time {runs}                         -> ms: of each run on the body's inputs
    peak {runtime, runs, limit}         -> bytes, in processes of their own, for so many seconds
    profile {runtime, warm_up, runs}    -> ms, operators (body: inputs, or none for zeros)

An answer that failed has ``error`` (its kind) and ``says``. While runs take long, answers with
nothing but ``busy`` say that the board is alive.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import select
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Answer = tuple[dict[str, Any], bytes]

HEAD = struct.Struct(">IQ")
READY = b"slimkit's runner listens\n"  # comes first; what stands in front of it is the shell's
GRACE_S = 2.0  # for a run to end by itself once nobody waits for it
SIGN_S = 1.0  # of life, while runs take longer than this
CHUNK = 1 << 20  # bytes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OnnxRuntime:
    """A session of ONNX Runtime, set up as slimkit's own backend does."""

    def __init__(self, folder: Path, threads: int, profile: str | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        path = the_file(folder, "*.onnx")
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = self.session.get_inputs()

    def zeros(self) -> list[Any]:
        """Inputs of the right shapes, for where values do not matter."""
        import numpy

        kinds = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}
        names = [i.type[len("tensor(") : -1] for i in self.inputs]
        return [numpy.zeros(i.shape, kinds.get(name, name)) for i, name in zip(self.inputs, names)]

    def run(self, arrays: list[Any]) -> list[Any]:
        """Output arrays, in order."""
        check_count(len(self.inputs), len(arrays))
        return self.session.run(None, {i.name: a for i, a in zip(self.inputs, arrays)})


class Ncnn:
    """A net of ncnn with float32 arithmetic, set up as slimkit's own backend does."""

    def __init__(self, folder: Path, threads: int) -> None:
        import ncnn

        self.ncnn, self.net = ncnn, ncnn.Net()
        self.net.opt.num_threads = threads
        for name in dir(self.net.opt):
            if name.startswith(("use_fp16_", "use_bf16_")):
                setattr(self.net.opt, name, False)
        param, weights = (the_file(folder, "*.ncnn." + end) for end in ("param", "bin"))
        shapes = json.loads((folder / "shapes.json").read_text())
        self.takes, self.shapes = shapes["inputs"], shapes["outputs"]
        if self.net.load_param(param) or self.net.load_model(weights):
            raise RuntimeError("ncnn cannot load the model")
        self.inputs = sorted(self.net.input_names(), key=self._number)
        self.outputs = sorted(self.net.output_names(), key=self._number)

    @staticmethod
    def _number(name: str) -> int:
        return int("".join(c for c in name if c.isdigit()) or 0)

    def run(self, arrays: list[Any]) -> list[Any]:
        """Output arrays, in order; ncnn has no batch dimension, so inputs are of one sample."""
        import numpy

        check_count(len(self.inputs), len(arrays))
        for array, shape in zip(arrays, self.takes):  # of another one, ncnn would read beyond it
            if list(array.shape) != shape:
                raise ValueError(
                    f"the model takes one sample of shape {tuple(shape)}, {array.shape} was given"
                )
        kinds = ["float32" if a.dtype.kind == "f" else "int32" for a in arrays]
        single = [numpy.ascontiguousarray(a[0], kind) for a, kind in zip(arrays, kinds)]
        # Copies in ncnn's own memory, as layers work in place; they must live until the end.
        mats = [self.ncnn.Mat(a).clone() for a in single]
        extractor = self.net.create_extractor()
        for name, mat in zip(self.inputs, mats):
            extractor.input(name, mat)
        found = []
        for name, shape in zip(self.outputs, self.shapes):
            code, mat = extractor.extract(name)
            if code != 0:
                raise RuntimeError(f"ncnn failed with code {code} to compute {name}")
            found.append(numpy.array(mat).reshape(shape))
        return found


RUNTIMES = {"onnxruntime": OnnxRuntime, "ncnn": Ncnn}


class Board:
    """What was sent and opened so far; one method a request."""

    def __init__(self, answer: Callable[[dict[str, Any], bytes], None]) -> None:
        self._answer = answer
        self._model: Any = None
        self._folder = Path()
        self._made = False

    def hello(self, _head: dict[str, Any], _body: Body) -> Answer:
        """How many threads can compute at once."""
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        return {"threads": len(cores) if cores else os.cpu_count() or 1}, b""

    def send(self, head: dict[str, Any], body: Body) -> Answer:
        """Write files into a new folder, which `close` removes."""
        self._folder = Path(tempfile.mkdtemp(prefix="slimkit-", dir=head["folder"] or None))
        self._made = True
        try:
            for name, size in head["files"].items():
                path = self._folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    while size:
                        size -= file.write(body.read(min(size, CHUNK)))
        except OSError:
            self.close()  # a full disk is not to stay full of this
            raise
        return {}, b""

    def open(self, head: dict[str, Any], _body: Body) -> Answer:
        """Open the files for runs."""
        self._model = RUNTIMES[head["runtime"]](self._folder, head["threads"])
        return {}, b""

    def run(self, _head: dict[str, Any], body: Body) -> Answer:
        """One run."""
        return {}, packed(self._model.run(unpacked(body)))

    def time(self, head: dict[str, Any], body: Body) -> Answer:
        """Many runs on the same inputs."""
        arrays, found, tell = unpacked(body), [], self._sign()
        for _ in range(head["runs"]):
            start = time.perf_counter()
            self._model.run(arrays)
            found.append(1000 * (time.perf_counter() - start))
            tell()
        return {"ms": found}, b""

    def _sign(self) -> Callable[[], None]:
        """Says that the board is alive, whenever the last sign is `SIGN_S` seconds ago."""
        last = [time.monotonic()]

        def tell() -> None:
            if time.monotonic() > last[0] + SIGN_S:
                self._answer({"busy": True}, b"")
                last[0] = time.monotonic()

        return tell

    def peak(self, head: dict[str, Any], body: Body) -> Answer:
        """Largest resident memory of a process that runs the files, less that of one without."""
        runtime, arrays = RUNTIMES[head["runtime"]], unpacked(body)
        with tempfile.TemporaryDirectory(dir=str(self._folder)) as nothing:
            base = child_peak(lambda: attempt(runtime, Path(nothing)), head["limit"])

        def work() -> None:
            model = runtime(self._folder, 1)
            for _ in range(head["runs"]):
                model.run(arrays)

        return {"bytes": max(0, child_peak(work, head["limit"]) - base)}, b""

    def profile(self, head: dict[str, Any], body: Body) -> Answer:
        """Operators by type: how many are executed, and the milliseconds of a median run."""
        model = OnnxRuntime(self._folder, 1, profile=str(self._folder / "profile"))
        arrays, tell = unpacked(body) or model.zeros(), self._sign()
        for _ in range(head["warm_up"] + head["runs"]):
            model.run(arrays)
            tell()
        path = Path(model.session.end_profiling())
        return kernels(json.loads(path.read_text()), head["warm_up"]), b""

    def close(self) -> None:
        """Leave nothing behind."""
        if self._made:
            shutil.rmtree(str(self._folder), ignore_errors=True)


def kernels(events: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """What a profile of ONNX Runtime says of each operator type."""
    starts = sorted(e["ts"] for e in events if e["name"] == "model_run")[warm_up:]
    runs: list[dict[str, list[float]]] = [{} for _ in starts]
    for event in events:
        if not event["name"].endswith("_kernel_time"):
            continue
        number = sum(start <= event["ts"] for start in starts) - 1
        if number >= 0:
            runs[number].setdefault(event["args"]["op_name"], []).append(event["dur"])
    names = sorted({name for run in runs for name in run})
    return {
        "operators": {name: len(runs[-1].get(name, ())) for name in names},
        "ms": {n: statistics.median(sum(run.get(n, ())) for run in runs) / 1000 for n in names},
    }


def the_file(folder: Path, pattern: str) -> str:
    """The file of a folder whose name fits."""
    found = next(folder.glob(pattern), None)
    if found is None:
        raise FileNotFoundError(f"{pattern} is missing")
    return str(found)


def check_count(wanted: int, given: int) -> None:
    """Refuse a wrong number of inputs."""
    if wanted != given:
        raise ValueError(f"the model takes {wanted} inputs, {given} were given")


def attempt(runtime: Any, folder: Path) -> None:
    """Import a runtime and let it find no file."""
    try:
        runtime(folder, 1)
    except ImportError:
        raise
    except Exception:
        pass


def child_peak(work: Callable[[], None], limit: int) -> int:
    """Largest resident memory, in bytes, of a forked process that does `work` in `limit` s."""
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(limit)
                work()
            except BaseException as error:
                told.write(reason(error).encode())
                told.flush()
                os._exit(1)
            os._exit(0)
        _, status, usage = os.wait4(child, 0)
        told.seek(0)
        text = told.read().decode()
    if status:
        raise RuntimeError(text or f"the process that was measured ended by signal {status}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def packed(arrays: list[Any]) -> bytes:
    """Arrays as the bytes of an .npz file."""
    import numpy

    buffer = io.BytesIO()
    numpy.savez(buffer, *arrays)
    return buffer.getvalue()


def unpacked(body: Body) -> list[Any]:
    """The arrays of an .npz file, in order; none of an empty body."""
    import numpy

    data = body.read()
    if not data:
        return []
    with numpy.load(io.BytesIO(data), allow_pickle=False) as found:
        return [found[f"arr_{number}"] for number in range(len(found.files))]


def reason(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def kind_of(error: Exception) -> str:
    """What went wrong, for whoever words the message."""
    if isinstance(error, ImportError):
        return "missing"
    if isinstance(error, OSError) and error.errno in FULL:
        return "full"
    if isinstance(error, OSError):
        return "files"
    return "model"


class Body:
    """So many bytes of a stream."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, size: int | None = None) -> bytes:
        """The next bytes, exactly; raises EOFError where the stream ends before."""
        size = self._left if size is None else min(size, self._left)
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError
        self._left -= size
        return data

    def skip(self) -> None:
        """Read what nobody wanted."""
        while self._left:
            self.read(CHUNK)


def leave_when_alone(board: Board, descriptor: int) -> None:
    """End the process once nobody can send requests any more, even inside a run that hangs."""

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # what is always told: that the other end hung up
        while not poll.poll():
            pass
        time.sleep(GRACE_S)
        board.close()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(stream: IO[bytes], sink: IO[bytes], descriptor: int | None = None) -> None:
    """Answer requests until the stream ends; then, at the latest, end what a descriptor is of."""

    def answer(head: dict[str, Any], body: bytes) -> None:
        text = json.dumps(head).encode()
        sink.write(HEAD.pack(len(text), len(body)) + text + body)
        sink.flush()

    board = Board(answer)
    if descriptor is not None:
        leave_when_alone(board, descriptor)
    try:
        while True:
            front = stream.read(HEAD.size)
            if len(front) < HEAD.size:
                return
            length, size = HEAD.unpack(front)
            head, body = json.loads(stream.read(length).decode()), Body(stream, size)
            try:
                found = getattr(board, head["do"])(head, body)
            except EOFError:
                return
            except Exception as error:
                found = {"error": kind_of(error), "says": reason(error)}, b""
            body.skip()
            answer(*found)
    except (EOFError, BrokenPipeError):
        return  # the connection is gone
    finally:
        board.close()


def main() -> None:
    """Serve standard input and output; whatever runtimes print goes to standard error."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sink.write(READY)
    sink.flush()
    serve(sys.stdin.buffer, sink, sys.stdin.fileno())


if __name__ == "__main__":
    main()
