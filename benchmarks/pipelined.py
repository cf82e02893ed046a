"""Claim: one client gets 300,000 no-op calls a second out of one executor when it does not wait for each.

raw           one frame per call on the bare channel, up to the channel's credits in flight: what the fabric
              and the executor can do
map           `site.map`, which sends short calls many to a frame
map_single    `site.map(..., chunk=1)`: a frame and a place in the scheduler for each call
submit        a future for each call on top
"""

import os
from collections import deque

import isthmus
from benchmarks.harness.sites import site_for
from benchmarks.harness.subject import Cells, pin_pair, run
from benchmarks.peers.workload import noop
from isthmus.core.api import LeaseRequest
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric import codec, open_domain
from isthmus.fabric.channels import Channel, Domain
from isthmus.fabric.frames import Hello, Kind
from isthmus.sdk.environment import capture
from isthmus.sdk.supply import LeaseSupply

CALLS_PER_REPEAT = 20  # times the budget's number of calls, which suits peers a hundred times slower


def measure(cells: Cells) -> None:
    with site_for(cells) as site:
        many = CALLS_PER_REPEAT
        cells.throughput("map_throughput_per_s", lambda calls: deque(site.map(noop, [b"x"] * calls), 0), many)
        cells.throughput(
            "map_single_throughput_per_s", lambda calls: deque(site.map(noop, [b"x"] * calls, chunk=1), 0)
        )
        cells.throughput("submit_throughput_per_s", lambda calls: submit_all(site, calls))
    with isthmus.connect() as site:
        measure_raw(cells, site)


def submit_all(site: isthmus.Site, calls: int) -> None:
    for future in [site.submit(noop, b"x") for _ in range(calls)]:
        future.result()


def measure_raw(cells: Cells, site: isthmus.Site) -> None:
    """Take a lease as the sdk does, and speak to its executor without the sdk's scheduler."""
    supply = LeaseSupply(site._control)
    (holding,) = supply.take(LeaseRequest(environment=capture()))
    domain = open_domain()
    try:
        hello = Hello(token=holding.token, python=python_version(), isthmus=ISTHMUS_VERSION)
        channel = domain.connect(holding.address, hello)
        define(channel, 1, os.getpid)
        define(channel, 2, noop)
        cells.notes.append("raw: " + pin_pair({ask(channel, 1)}))
        cells.throughput(
            "raw_throughput_per_s", lambda calls: pipeline(domain, channel, calls), CALLS_PER_REPEAT
        )
    finally:
        domain.close()
        supply.give_back(holding)


def define(channel: Channel, function_id: int, function: object) -> None:
    header = codec.encode_header(codec.FunctionHeader(name=function.__name__))
    channel.send(Kind.DEFINE, 0, function_id, header, (codec.encode_function(function),))


def ask(channel: Channel, function_id: int) -> int:
    meta, data = codec.pack_call((), {})
    frame = channel.call(1, function_id, meta, data, 0, 0.001, 5.0)
    if frame is None or frame.kind != Kind.RESULT:
        raise RuntimeError("the executor did not answer")
    return codec.decode_value(frame.meta, frame.data)


def pipeline(domain: Domain, channel: Channel, calls: int) -> None:
    credits = channel.peer.credits
    sent = answered = 0
    while answered < calls:
        while sent < calls and sent - answered < credits:
            meta, data = codec.pack_call((b"x",), {})
            if not channel.send(Kind.CALL, sent, 2, meta, data):
                break
            sent += 1
        frame = domain.poll(5.0, 0.001)
        if frame is None or frame.kind != Kind.RESULT:
            raise RuntimeError(f"call {answered} was not answered by a result")
        codec.decode_value(frame.meta, frame.data)
        answered += 1


if __name__ == "__main__":
    run("pipelined", measure)
