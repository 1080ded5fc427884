"""One server for all tests of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from loopback import Loopback, missing


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    if reason := missing():
        pytest.skip(reason)
    loopback = Loopback(tmp_path_factory.mktemp("sshd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{loopback.alias()}:{os.environ['PATH']}")
        yield loopback
    loopback.close()
