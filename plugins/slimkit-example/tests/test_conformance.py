from slimkit.testing import conformance


@conformance("slimkit-example", options={"criterion:fourth-power": [{}, {"power": 1.0}]})
def test_conformance(check):
    check()
