from slimkit.testing import conformance


@conformance("slimkit-cwd", options={"loss:cwd": [{}, {"temperature": 1.0}]})
def test_conformance(check):
    check()
