import pytest

from slimkit.testing import conformance

CHEAP = ["package:*", "backend:aoti-scheme_is_complete"]


@conformance("slimkit-aoti", only=CHEAP)
def test_the_package_keeps_its_promises(check):
    check()


@pytest.mark.slow  # a compiler runs for every model
@pytest.mark.timeout(1200)
@conformance(
    "slimkit-aoti",
    only=["backend:*"],
    expected_failures={
        "backend:aoti-runs_attention_networks_in_int8": "only convolutions compute on integers",
        "backend:aoti-the_same_model_gives_the_same_files": "the compiler names temporary files",
    },
)
def test_the_backend_keeps_its_promises(check):
    check()
