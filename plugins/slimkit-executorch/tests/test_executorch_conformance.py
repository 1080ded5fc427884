import pytest

from slimkit.testing import conformance

pytest.importorskip("executorch", reason="needs executorch: `make test-slow` has an environment")
pytest.importorskip("slimkit_executorch")


@conformance("slimkit-executorch")
def test_the_package_keeps_its_promises(check):
    check()
