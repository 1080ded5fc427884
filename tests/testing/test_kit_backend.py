"""Every promise of a backend is broken by a plugin that breaks only this one."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from breaking import broken_by, subject_of

from slimkit.builtin.backends.reference import FILE, Reference
from slimkit.errors import ExportError, UnavailableError
from slimkit.testing import Check
from slimkit.testing.backend import BACKEND

NETWORKS = ("convolutional", "residual", "attention", "detection")
FLOAT = {f"runs_{network}_networks_in_float" for network in NETWORKS}
INT8 = {f"runs_{network}_networks_in_int8" for network in NETWORKS}


class Unprepared(Reference):
    """Offers a variant whose option the constructor does not have."""

    float_variants = {"bf16": {"precision": "bf16"}}


class Silencing(Reference):
    """Sets small weights of the program to zero once it is saved."""

    def compile(self, deployable, directory):
        super().compile(deployable, directory)
        for tensor in deployable.program.constants.values():
            if tensor.is_floating_point():
                tensor[tensor.abs() < 0.05] = 0
        for tensor in deployable.program.state_dict.values():
            if tensor.is_floating_point():
                tensor.data[tensor.abs() < 0.05] = 0


class Remembering(Reference):
    """Opens what this process has written."""

    written = set()

    def compile(self, deployable, directory):
        super().compile(deployable, directory)
        self.written.add((directory / FILE).read_bytes())

    def load(self, directory, threads=1):
        run = super().load(directory, threads)
        if (directory / FILE).read_bytes() not in self.written:
            raise ExportError(f"{FILE} was written elsewhere")
        return run


class Faulty(Reference):
    """Is wrong by a twentieth, in float."""

    quantized, factor = False, 1.05

    def compile(self, deployable, directory):
        super().compile(deployable, directory)
        factor = self.factor if deployable.quantized == self.quantized else 1.0
        (directory / "factor.json").write_text(json.dumps({"factor": factor}))

    def load(self, directory, threads=1):
        run = super().load(directory, threads)
        try:
            factor = json.loads((directory / "factor.json").read_text())["factor"]
        except (OSError, ValueError) as error:
            raise ExportError("factor.json is damaged") from error
        return lambda *inputs: [factor * out for out in run(*inputs)]


class FaultyInInt8(Faulty):
    """Is wrong by a fifth, in int8."""

    quantized, factor = True, 1.2


class Blurring(Reference):
    """Each sample leaves a trace in the next one."""

    def load(self, directory, threads=1):
        run, last = super().load(directory, threads), [0.0]

        def blurred(*inputs):
            outs = [out + 1e-4 * last[0] for out in run(*inputs)]
            last[0] = float(inputs[0].double().abs().mean())
            return outs

        return blurred


class Optimistic(Reference):
    """Accepts what it does not compile."""

    def compile(self, deployable, directory):
        if "sort" in deployable.program.graph_module.code:
            raise ExportError("cannot sort")
        super().compile(deployable, directory)


class Speechless(Reference):
    """Refuses without a reason."""

    def check(self, deployable):
        return [""] if "sort" in deployable.program.graph_module.code else []


class Swapping(Reference):
    """Takes two inputs the other way round."""

    def load(self, directory, threads=1):
        run = super().load(directory, threads)
        return lambda *inputs: run(*reversed(inputs))


class Racing(Reference):
    """Loses something on several threads."""

    def load(self, directory, threads=1):
        run = super().load(directory, threads)
        return lambda *inputs: [out if threads == 1 else 0.9 * out for out in run(*inputs)]


class Confusing(Reference):
    """Compiles what it checked last."""

    def check(self, deployable):
        self.checked = deployable
        return []

    def compile(self, deployable, directory):
        super().compile(getattr(self, "checked", deployable), directory)


class Lazy(Reference):
    """Opens the file when it is first run."""

    def load(self, directory, threads=1):
        return lambda *inputs: Reference.load(self, directory, threads)(*inputs)


class Trusting(Reference):
    """Lets through whatever a damaged file raises."""

    def load(self, directory, threads=1):
        torch.export.load(directory / FILE)
        return super().load(directory, threads)


class Forgiving(Reference):
    """Gives zeros for inputs that do not fit."""

    def load(self, directory, threads=1):
        run = super().load(directory, threads)

        def forgiven(*inputs):
            try:
                return run(*inputs)
            except ExportError:
                return [torch.zeros(1, 10)]

        return forgiven


class Stamping(Reference):
    """Writes down when it compiled."""

    def compile(self, deployable, directory):
        super().compile(deployable, directory)
        (directory / "built.txt").write_text(str(time.time_ns()))


class Talking(Reference):
    """Says what it does."""

    def compile(self, deployable, directory):
        super().compile(deployable, directory)
        os.write(1, b"compiled\n")


class Littering(Reference):
    """Writes a log into the working directory."""

    def compile(self, deployable, directory):
        super().compile(deployable, directory)
        Path("compile.log").write_text("done")


class Misnaming(Reference):
    """Times operators that it does not count."""

    def profile(self, directory, inputs):
        return {"conv": 1.0}


MUTANTS = {
    Unprepared: {"scheme_is_complete"},
    Silencing: {
        "the_model_is_not_changed",
        "two_artifacts_at_once",
        "the_same_model_gives_the_same_files",
    },
    Remembering: {"runs_in_a_fresh_process"},
    Faulty: {*FLOAT, "preflight_tells_the_truth", "several_inputs_keep_their_order"},
    FaultyInInt8: INT8,
    Blurring: {
        "samples_do_not_meet",
        "two_artifacts_at_once",
        "inputs_that_do_not_fit_are_one_error",  # wrong ones leave a trace as well
    },
    Optimistic: {"preflight_tells_the_truth"},
    Speechless: {"preflight_tells_the_truth"},
    Swapping: {"several_inputs_keep_their_order"},
    Racing: {"threads_change_nothing_but_the_time"},
    Confusing: {"two_artifacts_at_once"},
    Lazy: {"an_open_file_outlives_its_folder"},
    Trusting: {"missing_or_damaged_files_are_one_error"},
    Forgiving: {"inputs_that_do_not_fit_are_one_error"},
    Stamping: {"the_same_model_gives_the_same_files"},
    Talking: {"prints_nothing"},
    Littering: {"writes_into_its_folder_only"},
    Misnaming: {"operators_and_times_fit"},
}
"""The first of several is what the others follow from: changed weights, wrong outputs."""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A fresh process finds the mutants, and what is written lies in a temporary folder."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_backend_breaks_the_promises_that_it_should(mutant):
    promises = [p for p in BACKEND if p.name in MUTANTS[mutant]]
    assert broken_by(promises, subject_of("backend", mutant)) == MUTANTS[mutant]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_backend_breaks_no_other_promise(mutant):
    assert broken_by(BACKEND, subject_of("backend", mutant)) == MUTANTS[mutant]


def test_every_promise_has_a_mutant():
    assert {promise.name for promise in BACKEND} == set().union(*MUTANTS.values())


def test_a_missing_runtime_skips_with_its_reason():
    class Elsewhere(Reference):
        """Runs on other machines."""

        def compile(self, deployable, directory):
            raise UnavailableError("the elsewhere backend needs a board: plug it in")

    promise = next(p for p in BACKEND if p.name == "an_open_file_outlives_its_folder")
    with pytest.raises(pytest.skip.Exception, match="needs a board: plug it in"):
        Check(subject_of("backend", Elsewhere), promise)()


def test_a_failure_names_the_network_and_what_came():
    promise = next(p for p in BACKEND if p.name == "runs_residual_networks_in_float")
    told = str(promise.broken(subject_of("backend", Faulty)))
    assert "came      signal to difference of 26.0 dB, less than 40 dB" in told
    assert "case      residual network (slimkit.testing.networks.Residual), in float" in told
