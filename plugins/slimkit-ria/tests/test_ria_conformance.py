from slimkit.testing import conformance


@conformance("slimkit-ria", options={"criterion:ria": [{}, {"power": 1.0}]})
def test_conformance(check):
    check()
