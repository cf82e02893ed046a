"""What the data plane of this machine is made of, for `isthmus fabric` and for bug reports.

Invariant: asking never fails; what does not work is part of the answer, with the reason.
"""

import re

from isthmus.core.errors import FabricError
from isthmus.core.model import Record

_RESOURCE = re.compile(r"resource \d+\s+:\s+md \d+\s+dev \d+\s+flags \S+\s+(\w+)/(\S+)")
_RDMA = re.compile(r"(rc|dc|ud|srd|gga)(_|$)|efa")


class Transport(Record, frozen=True):
    """One way to reach peers: a UCX transport (`rc_verbs`) on a device (`mlx5_0:1`)."""

    name: str
    device: str
    is_rdma: bool


class FabricReport(Record, frozen=True):
    """`why_not`: why native is not in use; `source`: where its library is from (libraries.Library)."""

    native: bool
    why_not: str = ""
    library: str = ""
    version: str = ""
    source: str = ""
    transports: tuple[Transport, ...] = ()

    @property
    def rdma_devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each.device for each in self.transports if each.is_rdma))

    def describe(self) -> str:
        """In words, several lines."""
        if not self.native:
            return f"fabric: plain Python (sockets and memfd)\nnative: not in use: {self.why_not}"
        lines = [f"fabric: UCX {self.version} ({_SOURCES[self.source]})", f"library: {self.library}"]
        for name in dict.fromkeys(each.name for each in self.transports):
            devices = [each.device for each in self.transports if each.name == name]
            lines.append(f"transport: {name:<10} {', '.join(devices)}{' (RDMA)' if _is_rdma(name) else ''}")
        lines.append(f"RDMA: {', '.join(self.rdma_devices) or _no_rdma(self.source)}")
        return "\n".join(lines)


_SOURCES = {
    "named": "named by ISTHMUS_UCX_LIBRARY",
    "site": "this machine's own, taken before the libucx wheel: it knows the devices here; "
    "ISTHMUS_UCX_LIBRARY names another",
    "wheel": "the libucx wheel: this machine has none of its own",
}


def report(library: str = "") -> FabricReport:
    """Opens a native domain for a moment (about 10 ms) and asks UCX what it found.

    library   path of a libucp.so.0; empty: found as for any domain
    """
    try:
        from isthmus.fabric.ucx import UcxDomain

        domain = UcxDomain(library)
    except ImportError as error:
        return FabricReport(native=False, why_not=f"the package was built without UCX ({error})")
    except FabricError as error:
        return FabricReport(native=False, why_not=str(error))
    try:
        transports = parse_transports(domain._describe())
    finally:
        domain.close()
    path, version, source = domain.library
    return FabricReport(native=True, library=path, version=version, source=source, transports=transports)


def render(made: FabricReport) -> str:
    return made.describe()


def parse_transports(context_text: str) -> tuple[Transport, ...]:
    """The transports that a UCX context lists, from the text of ucp_context_print_info."""
    return tuple(
        Transport(name=name, device=device, is_rdma=_is_rdma(name))
        for name, device in _RESOURCE.findall(context_text)
    )


def _is_rdma(transport_name: str) -> bool:
    return _RDMA.match(transport_name) is not None


def _no_rdma(source: str) -> str:
    if source == "wheel":
        return "none (this wheel is built without verbs: load the site's UCX for RDMA)"
    return "none found"
