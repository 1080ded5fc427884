"""What a hardware backend promises."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from slimkit.deploy.agreement import compare
from slimkit.deploy.deployed import Deployed, compile_, simulate
from slimkit.errors import ExportError
from slimkit.interfaces import Backend, Deployable, Scheme
from slimkit.progress import quiet
from slimkit.pruning.prune import prune
from slimkit.quantization.calibration import quantize
from slimkit.quantization.finished import finish
from slimkit.silence import captured
from slimkit.testing.networks import NETWORKS, UNUSUAL, made, several
from slimkit.testing.promises import Promises, Subject
from slimkit.testing.worker import in_fresh_process

BACKEND = Promises()

LEAST_DB = {False: 40.0, True: 20.0}
"""Signal to difference that file and simulation must have in float, and in int8."""
SAMPLES = 4


@dataclass(frozen=True)
class ModelCase:
    """A network to compile: float or int8, whole or pruned."""

    network: str
    quantized: bool = False
    pruned: bool = False
    batch: int = 1

    def __str__(self) -> str:
        network, shape = {**NETWORKS, **UNUSUAL}[self.network]
        how = [
            f"{self.network} network (slimkit.testing.networks.{network.__name__})",
            "in int8" if self.quantized else "in float",
            f"input of shape {(self.batch, *shape)}",
        ]
        return ", ".join(["pruned", *how] if self.pruned else how)

    def built(self, backend: Backend) -> tuple[nn.Module, Tensor]:
        """The model, and `SAMPLES` inputs for it; made once and not to be changed."""
        scheme = backend.scheme_with(None) if self.quantized else None
        return _built(self.network, self.pruned, scheme)

    def finished(self, backend: Backend) -> Deployable:
        """The model as a backend sees it."""
        model, inputs = self.built(backend)
        return finish(model, (inputs[: self.batch],))


@lru_cache(maxsize=64)
def _built(network: str, pruned: bool, scheme: Scheme | None) -> tuple[nn.Module, Tensor]:
    model, inputs = made(network, SAMPLES)
    with quiet():
        if pruned:
            model = prune(model, inputs[:1], target={"ratio": 0.3})
        if scheme is not None:
            model = quantize(model, [inputs], _Arithmetic(scheme), activations="minmax")
    return model, inputs


class _Arithmetic(Backend):
    """Nothing but a scheme, for what is quantized once for all backends that share it."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme  # type: ignore[misc]

    def compile(self, deployable: Deployable, directory: Path) -> None:
        raise NotImplementedError

    def load(self, directory: Path, threads: int = 1) -> Callable[..., list[Tensor]]:
        raise NotImplementedError


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slimkit-") as name:
        yield Path(name)


def _compiled(backend: Backend, case: ModelCase, folder: Path) -> Deployed:
    """The file of a model, compiled as `slimkit.export` does and opened."""
    model, inputs = case.built(backend)
    with quiet():
        example = (inputs[: case.batch],)
        return compile_(model, backend, example, folder, compared=False)[1]


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def _worst_db(expected: list[Tensor], found: list[Tensor]) -> float:
    """Signal to difference of the output that is farthest off."""
    return min(compare(expected, found).sqnr_db, default=math.inf)


def small(_: Subject) -> Iterator[ModelCase]:
    """The smallest network that has layers of all kinds."""
    yield ModelCase("convolutional")


def itself(_: Subject) -> Iterator[str]:
    """No case but the backend's class."""
    yield "the class by itself"


@BACKEND.on(itself)
def scheme_is_complete(subject: Subject, _case: str) -> str | None:
    """The class says what it computes: `scheme`, `channel_multiple` and `float_variants`.

    The grids of the scheme are sized by slimkit (channels = 1), and the constructor takes the
    options of every variant.
    """
    backend = subject.make()
    scheme = getattr(backend, "scheme", None)
    if not isinstance(scheme, Scheme):
        return f"scheme = {scheme!r}, not a slimkit.interfaces.Scheme"
    for name in ("activations", "weights"):
        if getattr(scheme, name).channels != 1:
            return f"scheme.{name} has {getattr(scheme, name).channels} channels"
    multiple = backend.channel_multiple
    if not isinstance(multiple, int) or multiple < 1:
        return f"channel_multiple = {multiple!r}, not a whole number of at least 1"
    for name, options in backend.float_variants.items():
        try:
            type(backend)(**{**subject.options, **options})
        except TypeError as error:
            return f"variant {name!r}: {error}"
    return None


@BACKEND.on(small)
def the_model_is_not_changed(subject: Subject, case: ModelCase) -> str | None:
    """`check`, `compile` and `load` leave the program as it is; others read it, too."""
    backend = subject.make()
    deployable = case.finished(backend)
    program = deployable.program
    tensors = {**program.state_dict, **program.constants}
    before = {n: t.clone() for n, t in tensors.items() if isinstance(t, Tensor)}
    code = program.graph_module.code
    with _folder() as folder:
        backend.check(deployable)
        backend.compile(deployable, folder)
        backend.load(folder)
    if program.graph_module.code != code:
        return "another graph"
    after = {**program.state_dict, **program.constants}
    for name, tensor in before.items():
        if name not in after or not torch.equal(tensor, after[name]):
            return f"another tensor {name}"
    return None


@BACKEND.on(small)
def runs_in_a_fresh_process(subject: Subject, case: ModelCase) -> str | None:
    """The files alone are enough: a fresh process loads them and computes the same."""
    backend = subject.make()
    with _folder() as folder:
        deployed = _compiled(backend, case, folder / "files")
        inputs = case.built(backend)[1][:1]
        expected = [out.clone() for out in deployed.flat(inputs)]
        target = subject.target or f"{type(backend).__module__}:{type(backend).__name__}"
        plan = {"target": target, "options": dict(subject.options)}
        (folder / "plan.json").write_text(json.dumps(plan))
        torch.save((inputs,), folder / "inputs.pt")
        in_fresh_process("running", folder)
        found = torch.load(folder / "outputs.pt")
    if _equal(found, expected):
        return None
    return f"other outputs: {compare(expected, found)}"


def _agreement(subject: Subject, case: ModelCase) -> str | None:
    backend = subject.make()
    model, inputs = case.built(backend)
    with _folder() as folder:
        found = _compiled(backend, case, folder / "files").flat(inputs)
    expected = simulate(model, inputs)
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        return f"outputs of shape {shapes[0]} instead of {shapes[1]}"
    ratios = compare(expected, found).sqnr_db
    least = LEAST_DB[case.quantized]
    if min(ratios) < least:
        return f"signal to difference of {min(ratios):.1f} dB, less than {least:.0f} dB"
    return None


def _add_agreements() -> None:
    """One promise for each network and precision, so that one of them may be expected to fail."""
    for network in NETWORKS:
        for quantized in (False, True):
            precision = "int8" if quantized else "float"

            def cases(
                _: Subject, network: str = network, quantized: bool = quantized
            ) -> Iterator[ModelCase]:
                yield ModelCase(network, quantized)
                yield ModelCase(network, quantized, pruned=True)

            def breach(subject: Subject, case: ModelCase) -> str | None:
                return _agreement(subject, case)

            breach.__name__ = f"runs_{network}_networks_in_{precision}"
            breach.__doc__ = (
                f"The file of a small {network} network, whole and pruned, computes what the "
                f"{'simulation' if quantized else 'model'} does: at least "
                f"{LEAST_DB[quantized]:.0f} dB of signal to difference."
            )
            BACKEND.on(cases)(breach)


_add_agreements()


@BACKEND.on(small)
def samples_do_not_meet(subject: Subject, case: ModelCase) -> str | None:
    """A file is made for one sample; several in a row give what each gives alone.

    Outputs stay as they are when the file runs again.
    """
    backend = subject.make()
    inputs = case.built(backend)[1]
    with _folder() as folder:
        run = _compiled(backend, case, folder / "files").runner
        alone = [[t.clone() for t in run(inputs[i : i + 1])] for i in range(len(inputs))]
        held = [run(inputs[i : i + 1]) for i in reversed(range(len(inputs)))]
    for sample, outputs in enumerate(reversed(held)):
        if not _equal(list(outputs), alone[sample]):
            return f"other outputs for sample {sample} when it came in another order"
    return None


def unusual(_: Subject) -> Iterator[ModelCase]:
    """Models and shapes that a backend may refuse."""
    yield ModelCase("convolutional", batch=SAMPLES)
    for network in ("attention", "detection", *UNUSUAL):
        yield ModelCase(network)


@BACKEND.on(unusual)
def preflight_tells_the_truth(subject: Subject, case: ModelCase) -> str | None:
    """What `check` accepts compiles, runs and agrees; what it refuses has a reason in words."""
    backend = subject.make()
    model, inputs = case.built(backend)
    deployable = case.finished(backend)
    problems = backend.check(deployable)
    for problem in problems:
        if not isinstance(problem, str) or not problem.strip():
            return f"refused with {problem!r}, which is no reason"
    if problems:
        return None
    remarks = backend.remarks(deployable)
    if not isinstance(remarks, list | tuple) or not all(isinstance(r, str) for r in remarks):
        return f"remarks {remarks!r}, which are no sentences"
    with _folder() as folder:
        try:
            backend.compile(deployable, folder)
            found = list(backend.load(folder)(inputs[: case.batch]))
        except ExportError as error:
            return f"accepted, and then {error}"
    expected = simulate(model, inputs[: case.batch])
    if [t.shape for t in found] != [t.shape for t in expected]:
        return f"accepted, and then outputs of shape {[tuple(t.shape) for t in found]}"
    worst = _worst_db(expected, found)
    if worst < LEAST_DB[False]:
        return f"accepted, and then {worst:.1f} dB of signal to difference"
    return None


def with_several(_: Subject) -> Iterator[str]:
    """Networks with several inputs."""
    yield "pair"
    yield "tokens"


@BACKEND.on(with_several)
def several_inputs_keep_their_order(subject: Subject, case: str) -> str | None:
    """Inputs of one shape, and whole numbers, come as the forward's arguments, or are refused."""
    backend = subject.make()
    model, inputs = several(case)
    deployable = finish(model, inputs)
    if backend.check(deployable):
        return None
    with _folder() as folder:
        backend.compile(deployable, folder)
        found = list(backend.load(folder)(*inputs))
    worst = _worst_db(simulate(model, *inputs), found)
    if worst < LEAST_DB[False]:
        return f"accepted, and then {worst:.1f} dB of signal to difference"
    return None


@BACKEND.on(small)
def threads_change_nothing_but_the_time(subject: Subject, case: ModelCase) -> str | None:
    """A file opened with ``threads=2`` computes what it does with one, but for the sums' order."""
    backend = subject.make()
    inputs = case.built(backend)[1][:1]
    with _folder() as folder:
        expected = [t.clone() for t in _compiled(backend, case, folder / "files").flat(inputs)]
        found = list(backend.load(folder / "files", threads=2)(inputs))
    worst = _worst_db(expected, found)
    if worst < LEAST_DB[False]:
        return f"{worst:.1f} dB of signal to difference between one thread and two"
    return None


@BACKEND.on(small)
def two_artifacts_at_once(subject: Subject, case: ModelCase) -> str | None:
    """Two models checked, compiled, opened and run by turns give what each gives alone."""
    backend = subject.make()
    both = [case, ModelCase("residual")]
    deployables = [one.finished(backend) for one in both]
    inputs = [one.built(backend)[1][:1] for one in both]
    alone = []
    for deployable, x in zip(deployables, inputs, strict=True):
        with _folder() as folder:
            own = subject.make()
            own.compile(deployable, folder)
            alone.append([t.clone() for t in own.load(folder)(x)])
    with _folder() as first, _folder() as second:
        for deployable in deployables:
            backend.check(deployable)
        for deployable, folder in zip(deployables, (first, second), strict=True):
            backend.compile(deployable, folder)
        runners = [backend.load(folder) for folder in (first, second)]
        for turn in range(2):
            for number, (run, x) in enumerate(zip(runners, inputs, strict=True)):
                if not _equal(list(run(x)), alone[number]):
                    return f"other outputs of {both[number]} in turn {turn}"
    return None


@BACKEND.on(small)
def an_open_file_outlives_its_folder(subject: Subject, case: ModelCase) -> str | None:
    """Once `load` returns, the folder may be moved or removed: artifacts are replaced."""
    backend = subject.make()
    inputs = case.built(backend)[1][:1]
    with _folder() as folder:
        deployed = _compiled(backend, case, folder / "files")
        expected = [t.clone() for t in deployed.flat(inputs)]
        run = backend.load(folder / "files")
    found = list(run(inputs))
    return None if _equal(found, expected) else "other outputs once the folder was gone"


@BACKEND.on(small)
def missing_or_damaged_files_are_one_error(subject: Subject, case: ModelCase) -> str | None:
    """Without one of its files, or with half of it, a folder is not opened.

    The `ExportError` names the file or the folder.
    """
    backend = subject.make()
    inputs = case.built(backend)[1][:1]
    with _folder() as folder:
        deployed = _compiled(backend, case, folder / "files")
        expected = [t.clone() for t in deployed.flat(inputs)]
        for path in sorted((folder / "files").rglob("*")):
            if not path.is_file():
                continue
            whole = path.read_bytes()
            for how, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("gone", None)):
                path.unlink() if content is None else path.write_bytes(content)
                try:
                    found = list(backend.load(folder / "files")(inputs))
                except ExportError as error:
                    if path.name not in str(error) and str(path.parent) not in str(error):
                        return f"{path.name} {how}: {error!r} names no file"
                else:
                    if not _equal(found, expected):  # the file may hold what nobody needs
                        return f"{path.name} {how}, and other outputs"
                path.write_bytes(whole)
    return None


@BACKEND.on(small)
def inputs_that_do_not_fit_are_one_error(subject: Subject, case: ModelCase) -> str | None:
    """One input too many, none, or one of another shape is an `ExportError`, and no output."""
    backend = subject.make()
    x = case.built(backend)[1][:1]
    others = {
        "two inputs instead of one": (x, x),
        "no input": (),
        "twice the channels": (torch.cat([x, x], 1),),
        "an input without its batch": (x[0],),
        "a column less": (x[..., :-1],),
    }
    with _folder() as folder:
        run = _compiled(backend, case, folder / "files").runner
        expected = [t.clone() for t in run(x)]
        for what, inputs in others.items():
            try:
                found = list(run(*inputs))
            except ExportError:
                continue
            return f"outputs of shape {[tuple(t.shape) for t in found]} for {what}"
        found = list(run(x))
    return None if _equal(found, expected) else "other outputs after inputs that did not fit"


@BACKEND.on(small)
def the_same_model_gives_the_same_files(subject: Subject, case: ModelCase) -> str | None:
    """Compiled twice, a model gives the same bytes: whoever builds it again can compare."""
    backend = subject.make()
    deployable = case.finished(backend)
    with _folder() as folder:
        found = []
        for name in ("first", "second"):
            (folder / name).mkdir()
            subject.make().compile(deployable, folder / name)
            files = [path for path in (folder / name).rglob("*") if path.is_file()]
            found.append({path.relative_to(folder / name): path.read_bytes() for path in files})
    first, second = found
    others = [str(path) for path in first.keys() | second if first.get(path) != second.get(path)]
    return f"other bytes in {', '.join(sorted(others))}" if others else None


@BACKEND.on(small)
def prints_nothing(subject: Subject, case: ModelCase) -> str | None:
    """Nothing reaches the terminal but through `logging`, from runtimes in C++ neither."""
    backend = subject.make()
    deployable = case.finished(backend)
    with _folder() as folder, captured() as said:
        backend.check(deployable)
        backend.compile(deployable, folder)
        backend.load(folder)(case.built(backend)[1][:1])
        backend.operators(folder)
    return f"{said()!r}" if said() else None


@BACKEND.on(small)
def writes_into_its_folder_only(subject: Subject, case: ModelCase) -> str | None:
    """`compile` writes files, all of them into the folder that it is given."""
    backend = subject.make()
    deployable = case.finished(backend)
    with _folder() as folder, _folder() as elsewhere:
        before = Path.cwd()
        os.chdir(elsewhere)
        try:
            backend.check(deployable)
            backend.compile(deployable, folder)
        finally:
            os.chdir(before)
        if not any(path.is_file() for path in folder.rglob("*")):
            return "no file in the folder"
        strays = sorted(path.name for path in elsewhere.iterdir())
        return f"{strays} in the working directory" if strays else None


@BACKEND.on(small)
def operators_and_times_fit(subject: Subject, case: ModelCase) -> str | None:
    """`operators` counts what the runtime executes; `profile` times operators of those names."""
    backend = subject.make()
    with _folder() as folder:
        _compiled(backend, case, folder / "files")
        counts = backend.operators(folder / "files")
        times = backend.profile(folder / "files", (case.built(backend)[1][:1],))
    for name, count in counts.items():
        if not isinstance(name, str) or not isinstance(count, int) or count < 1:
            return f"operators says {count!r} of {name!r}"
    for name, time in times.items():
        if name not in counts:
            return f"profile times {name!r}, which operators does not name"
        if not time >= 0:
            return f"profile says that {name!r} takes {time!r} ms"
    return None
