"""Peak memory of running a file, in a process of its own."""

from __future__ import annotations

from hungry import MIB, Crashing, Hanging, Hungry
from nets import normal

from slimkit.deploy.memory import Peak, peaks

X = (normal(1, 3),)


def files(tmp_path, **sizes):
    found = {}
    for name, size in sizes.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "size").write_text(str(size))
        found[name] = (Hungry(), folder)
    return found


def test_the_peak_is_what_running_needs_beyond_the_runtime(tmp_path) -> None:
    found = peaks(files(tmp_path, large=300, small=1), X)
    assert 295 * MIB < found["large"].bytes < 320 * MIB
    assert found["small"].bytes < 20 * MIB


def test_what_this_process_holds_does_not_count(tmp_path) -> None:
    held = bytearray(400 * MIB)
    held[::1024] = b"1" * len(held[::1024])
    assert peaks(files(tmp_path, small=1), X)["small"].bytes < 20 * MIB


def test_a_file_that_cannot_run_has_its_reason_and_spoils_no_other(tmp_path) -> None:
    wanted = files(tmp_path, good=50, bad="no number")
    found = peaks(wanted, X)
    assert found["bad"].bytes is None
    assert found["bad"].problem.startswith("ValueError: invalid literal")
    assert found["good"].bytes > 45 * MIB


def test_a_crash_and_a_hang_are_reasons_too(tmp_path) -> None:
    wanted = files(tmp_path, good=50, crash=1, hang=1)
    wanted["crash"] = (Crashing(), wanted["crash"][1])
    wanted["hang"] = (Hanging(), wanted["hang"][1])
    found = peaks(wanted, X, timeout_s=1.0)
    assert found["crash"].problem == "it was ended by SIGKILL"
    assert found["hang"].problem == "it ran longer than 1 s"
    assert found["good"].bytes > 45 * MIB


def test_a_backend_that_no_other_process_can_have_is_a_reason(tmp_path) -> None:
    class Local(Hungry):
        """Cannot be pickled."""

    wanted = files(tmp_path, good=50, local=1)
    wanted["local"] = (Local(), wanted["local"][1])
    found = peaks(wanted, X)
    assert found["local"].problem.startswith("the backend cannot be sent to another process")
    assert found["good"].bytes > 45 * MIB


class Elsewhere(Hungry):
    """Says itself what its files need."""

    def peak_bytes(self, directory, inputs):
        return int((directory / "size").read_text()) * len(inputs)


def test_a_backend_that_knows_its_memory_is_believed(tmp_path) -> None:
    wanted = files(tmp_path, here=50, there=7)
    wanted["there"] = (Elsewhere(), wanted["there"][1])
    found = peaks(wanted, X)
    assert found["there"] == Peak(7)
    assert found["here"].bytes > 45 * MIB


def test_a_device_that_fails_to_measure_is_a_reason(tmp_path) -> None:
    wanted = files(tmp_path, there="no number")
    wanted["there"] = (Elsewhere(), wanted["there"][1])
    found = peaks(wanted, X)
    assert found["there"].problem.startswith("ValueError: invalid literal")
