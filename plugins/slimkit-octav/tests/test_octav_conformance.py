from slimkit.testing import conformance


@conformance("slimkit-octav")
def test_conformance(check):
    check()
