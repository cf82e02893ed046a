"""What `isthmus fabric` tells."""

from isthmus.fabric.report import FabricReport, Transport, parse_transports, render, report

CONTEXT = """
#            md 5  :  component 5  ib
#      resource 0  :  md 0  dev 0  flags -- self/memory
#      resource 1  :  md 1  dev 1  flags -- tcp/eth0
#      resource 2  :  md 5  dev 2  flags -- rc_verbs/rxe0:1
#      resource 3  :  md 5  dev 2  flags -a ud_verbs/rxe0:1
"""


def test_transports_are_read_from_what_ucx_prints() -> None:
    transports = parse_transports(CONTEXT)
    assert [each.name for each in transports] == ["self", "tcp", "rc_verbs", "ud_verbs"]
    assert [each.is_rdma for each in transports] == [False, False, True, True]
    assert transports[2] == Transport(name="rc_verbs", device="rxe0:1", is_rdma=True)
    assert parse_transports("nothing of the kind") == ()


def test_rdma_devices_are_named_once() -> None:
    made = FabricReport(native=True, version="1.13.1", source="site", transports=parse_transports(CONTEXT))
    assert made.rdma_devices == ("rxe0:1",)
    assert "RDMA: rxe0:1" in render(made)
    assert "rc_verbs   rxe0:1 (RDMA)" in render(made)


def test_the_wheel_says_why_it_has_no_rdma() -> None:
    made = FabricReport(
        native=True, version="1.22.0", source="wheel", transports=parse_transports(CONTEXT)[:2]
    )
    assert "built without verbs" in render(made)


def test_the_reason_is_given_when_native_is_not_in_use() -> None:
    assert "not in use: no compiler" in render(FabricReport(native=False, why_not="no compiler"))


def test_this_machine_can_be_asked() -> None:
    made = report()
    assert made.native != bool(made.why_not)
    assert not made.native or any(each.name == "self" for each in made.transports)
