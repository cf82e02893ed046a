"""Claim: one client gets 300,000 no-op calls a second out of one executor when it does not wait for each.

raw           one frame per call on the bare channel, up to the channel's credits in flight: what the fabric
              and the executor can do
map           `site.map`, which sends short calls many to a frame
map_single    `site.map(..., chunk=1)`: a frame and a place in the scheduler for each call
submit        a future for each call on top
"""

from collections import deque

import isthmus
from benchmarks.harness.sites import FUNCTION_ID, bare_channel, define, site_for
from benchmarks.harness.subject import Cells, run
from benchmarks.peers.workload import noop
from isthmus.fabric import codec
from isthmus.fabric.channels import Channel, Domain
from isthmus.fabric.frames import Kind

CALLS_PER_REPEAT = 20  # times the budget's number of calls, which suits peers a hundred times slower


def measure(cells: Cells) -> None:
    with site_for(cells) as site:
        many = CALLS_PER_REPEAT
        cells.throughput("map_throughput_per_s", lambda calls: deque(site.map(noop, [b"x"] * calls), 0), many)
        cells.throughput(
            "map_single_throughput_per_s", lambda calls: deque(site.map(noop, [b"x"] * calls, chunk=1), 0)
        )
        cells.throughput("submit_throughput_per_s", lambda calls: submit_all(site, calls))
    with bare_channel(cells) as (domain, channel):
        define(channel, noop)
        cells.throughput(
            "raw_throughput_per_s", lambda calls: pipeline(domain, channel, calls), CALLS_PER_REPEAT
        )


def submit_all(site: isthmus.Site, calls: int) -> None:
    for future in [site.submit(noop, b"x") for _ in range(calls)]:
        future.result()


def pipeline(domain: Domain, channel: Channel, calls: int) -> None:
    credits = channel.peer.credits
    sent = answered = 0
    while answered < calls:
        while sent < calls and sent - answered < credits:
            meta, data = codec.pack_call((b"x",), {})
            if not channel.send(Kind.CALL, sent, FUNCTION_ID, meta, data):
                break
            sent += 1
        frame = domain.poll(5.0, 0.001)
        if frame is None or frame.kind != Kind.RESULT:
            raise RuntimeError(f"call {answered} was not answered by a result")
        codec.decode_value(frame.meta, frame.data)
        answered += 1


if __name__ == "__main__":
    run("pipelined", measure)
