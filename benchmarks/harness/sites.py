"""An embedded site for one claim, with the caller and the executor pinned to a core each.

Not here: what is measured.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import isthmus
from benchmarks.harness.subject import Cells, pin_pair
from isthmus.core.api import LeaseRequest
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.core.settings import ClientSettings, Settings
from isthmus.fabric import codec, open_domain
from isthmus.fabric.channels import Channel, Domain
from isthmus.fabric.frames import Hello, Kind
from isthmus.sdk.environment import capture
from isthmus.sdk.supply import LeaseSupply

ONE_EXECUTOR = Settings(client=ClientSettings(pool_max=1))
_GETPID_ID = 1
FUNCTION_ID = 2


@contextmanager
def site_for(cells: Cells) -> Iterator[isthmus.Site]:
    """An embedded site and one executor, never more."""
    cells.versions["isthmus"] = isthmus.__version__
    with isthmus.connect(settings=ONE_EXECUTOR) as site:
        cells.notes.append(pin_pair({site.call(os.getpid)}))
        yield site


@contextmanager
def bare_channel(cells: Cells) -> Iterator[tuple[Domain, Channel]]:
    """A channel to an executor without the sdk's scheduler: leased as the sdk does it, function undefined."""
    with isthmus.connect() as site:
        supply = LeaseSupply(site._control)
        (holding,) = supply.take(LeaseRequest(environment=capture()))
        domain = open_domain()
        try:
            hello = Hello(token=holding.token, python=python_version(), isthmus=ISTHMUS_VERSION)
            channel = domain.connect(holding.address, hello)
            define(channel, os.getpid, _GETPID_ID)
            cells.notes.append(f"bare channel by {channel.transport}: {pin_pair({_ask(channel)})}")
            yield domain, channel
        finally:
            domain.close()
            supply.give_back(holding)


def define(channel: Channel, function: Callable[..., object], function_id: int = FUNCTION_ID) -> None:
    header = codec.encode_header(codec.FunctionHeader(name=function.__name__))
    channel.send(Kind.DEFINE, 0, function_id, header, (codec.encode_function(function),))


def define_native(channel: Channel, library: str, symbol: str) -> None:
    header = codec.FunctionHeader(
        name=symbol, kind="native", library=library, symbol=symbol, result_bytes_max=64
    )
    channel.send(Kind.DEFINE, 0, FUNCTION_ID, codec.encode_header(header))


def _ask(channel: Channel) -> int:
    meta, data = codec.pack_call((), {})
    frame = channel.call(1, _GETPID_ID, meta, data, 0, 0.001, 5.0)
    if frame is None or frame.kind != Kind.RESULT:
        raise RuntimeError("the executor did not answer")
    return int(codec.decode_value(frame.meta, frame.data))
