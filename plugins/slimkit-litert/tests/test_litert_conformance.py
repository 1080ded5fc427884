import pytest

pytest.importorskip("slimkit_litert", reason="`make test-slow` installs it in .venv-litert")
pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install ai-edge-litert")

from slimkit.testing import conformance  # noqa: E402


@conformance("slimkit-litert")
def test_the_package_keeps_its_promises(check):
    check()
