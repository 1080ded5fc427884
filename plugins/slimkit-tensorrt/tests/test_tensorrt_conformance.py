import pytest

from slimkit.testing import conformance

ONCE = ("scheme", "samples", "two_artifacts", "missing", "inputs", "the_same", "prints")
CHEAP = ["package:*", *(f"backend:*-{promise}*" for promise in ONCE)]


@conformance("slimkit-tensorrt", only=CHEAP)
def test_the_package_keeps_its_promises(check):
    check()


@pytest.mark.slow
@conformance("slimkit-tensorrt", only=["backend:*"])
def test_the_backend_keeps_its_promises(check):
    check()
