from slimkit.testing import conformance


@conformance("slimkit-skd", options={"loss:pair-wise": [{}, {"patch": 2}]})
def test_conformance(check):
    check()
