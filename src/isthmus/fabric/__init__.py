"""The data plane: frames, the codec, and channels in two implementations behind one Protocol."""

from isthmus.core.errors import FabricError
from isthmus.fabric.channels import Domain
from isthmus.fabric.sockets import SocketDomain


def open_domain(preference: str = "auto") -> Domain:
    """A new domain: `ucx`, `sockets`, or `auto`, the first of them that works here.

    raises  FabricError when the one that was asked for is not to be had; the message says why
    """
    if preference == "sockets":
        return SocketDomain()
    if preference not in ("auto", "ucx"):
        raise FabricError(f"no fabric domain {preference!r}; choose auto, ucx or sockets")
    try:
        from isthmus.fabric.ucx import UcxDomain

        return UcxDomain()
    except (ImportError, FabricError) as error:
        if preference == "ucx":
            raise FabricError(f"the ucx fabric domain does not work here: {error}") from error
        return SocketDomain()


__all__ = ["open_domain"]
