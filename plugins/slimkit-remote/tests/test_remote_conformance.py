import sys

import pytest
from loopback import ALIAS, server

from slimkit.testing import conformance

CHEAP = ["package:*", *(f"backend:*-{p}" for p in ("scheme_is_complete", "samples_do_not_meet"))]
OPTIONS = {
    "backend:remote": [
        {"host": ALIAS, "python": sys.executable, "backend": kind}
        for kind in ("onnxruntime", "ncnn")
    ]
}


@pytest.mark.usefixtures("server")
@conformance("slimkit-remote", only=CHEAP, options=OPTIONS)
def test_the_package_keeps_its_promises(check):
    check()


@pytest.mark.slow
@pytest.mark.usefixtures("server")
@conformance("slimkit-remote", only=["backend:*"], options=OPTIONS)
def test_the_backend_keeps_its_promises(check):
    check()
