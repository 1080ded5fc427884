import pytest

from slimkit.testing import conformance

CHEAP = ["package:*", *(f"backend:*-{p}" for p in ("scheme_is_complete", "samples_do_not_meet"))]


@conformance("slimkit-tensorrt", only=CHEAP)
def test_the_package_keeps_its_promises(check):
    check()


@pytest.mark.slow
@conformance("slimkit-tensorrt", only=["backend:*"])
def test_the_backend_keeps_its_promises(check):
    check()
