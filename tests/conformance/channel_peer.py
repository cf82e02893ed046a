"""The other process of the channel suite: answers CALLs according to their function id.

Run as `python -m tests.conformance.channel_peer DOMAIN ADDRESS PARENT`; prints the address it listens at
and serves until its parent is gone.
"""

import contextlib
import enum
import os
import signal
import sys
import time
from collections import deque

from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric import open_domain
from isthmus.fabric.channels import Channel, Domain, Frame
from isthmus.fabric.frames import Hello, Kind, Refusal, Welcome

CREDITS = 64


class Act(enum.IntEnum):
    ECHO = 0  # RESULT with the same meta and data
    HOLD = 1  # no answer, ever
    BURST = 2  # int(meta) YIELDs numbered in their meta, then a RESULT
    BURST_AND_DIE = 3  # the same, and SIGKILL in place of the RESULT
    NAP = 4  # do not poll for float(meta) seconds, then a RESULT
    DIE = 5
    GIVE = 6  # int(meta) bytes of data
    GIVE_AND_DIE = 7
    TAKE = 8  # RESULT with the number of data bytes and their first and last 8
    CLOSE = 9  # close the channel
    DESCRIPTORS = 10  # RESULT with the number of open descriptors
    URGE = 11  # an urgent CANCEL back, after float(meta) seconds
    FORK_AND_DIE = 12  # leave a child behind that holds what it inherits, and die
    DEFINE = 13  # meta: library, symbol, result_bytes_max, by spaces; defines function id 100
    ABOUT = 14  # RESULT: the header fields that came with the call
    MALFORMED = 15  # RESULT with domain.malformed_peers


def admit(hello: Hello) -> Welcome | Refusal:
    if hello.token == "refuse":
        return Refusal(code="TokenError", message="lease token expired 3.0 s ago; renew the lease")
    if hello.token == "drain":
        return Refusal(code="LeaseEndedError", message="draining")
    return Welcome(
        executor="ex_test",
        python=python_version(),
        isthmus=ISTHMUS_VERSION,
        channel_id=0,
        channel_key=0,
        credits=CREDITS,
    )


class Peer:
    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.waiting: deque[tuple[Channel, tuple[object, ...]]] = deque()  # answers that found no room
        self.calls_seen = 0

    def serve(self, parent: int) -> None:
        while os.getppid() == parent:
            frame = self.domain.poll(0.002 if self.waiting else 0.5)
            if frame is not None:
                self.handle(frame)
            while self.waiting and self.try_send(*self.waiting[0]):
                self.waiting.popleft()

    def try_send(self, channel: Channel, arguments: tuple[object, ...]) -> bool:
        if not channel.alive:
            return True
        return channel.send(*arguments)  # type: ignore[arg-type]

    def send(self, channel: Channel, *arguments: object) -> None:
        if self.waiting or not self.try_send(channel, arguments):
            self.waiting.append((channel, arguments))

    def handle(self, frame: Frame) -> None:
        channel = self.domain.channel(frame.channel_id)
        if channel is None:
            return
        if frame.kind == Kind.CANCEL:
            self.send(channel, Kind.RESULT, frame.call_id, 0, str(self.calls_seen).encode())
        elif frame.kind == Kind.CALL:
            self.calls_seen += 1
            self.act(Act(frame.function_id), channel, frame)

    def act(self, act: Act, channel: Channel, frame: Frame) -> None:
        data = () if frame.data is None else (frame.data,)
        match act:
            case Act.ECHO:
                self.send(channel, Kind.RESULT, frame.call_id, frame.function_id, frame.meta, data)
            case Act.BURST | Act.BURST_AND_DIE:
                for number in range(int(frame.meta)):
                    self.send(channel, Kind.YIELD, frame.call_id, 0, str(number).encode())
                self.finish(act == Act.BURST_AND_DIE, channel, frame, ())
            case Act.NAP:
                time.sleep(float(frame.meta))
                self.finish(False, channel, frame, ())
            case Act.DIE:
                os.kill(os.getpid(), signal.SIGKILL)
            case Act.GIVE | Act.GIVE_AND_DIE:
                self.finish(act == Act.GIVE_AND_DIE, channel, frame, (bytes(int(frame.meta)),))
            case Act.TAKE:
                taken = frame.data if frame.data is not None else memoryview(b"")
                about = f"{len(taken)} ".encode() + bytes(taken[:8]) + bytes(taken[-8:])
                self.send(channel, Kind.RESULT, frame.call_id, 0, about)
            case Act.CLOSE:
                channel.close()
            case Act.DESCRIPTORS:
                count = len(os.listdir("/proc/self/fd"))
                self.send(channel, Kind.RESULT, frame.call_id, 0, str(count).encode())
            case Act.URGE:
                time.sleep(float(frame.meta))
                channel.send_urgent(Kind.CANCEL, frame.call_id, b"cancel")
            case Act.FORK_AND_DIE:
                if os.fork() == 0:
                    os.execvp("sleep", ["sleep", "5"]) if frame.meta == b"exec" else time.sleep(5)
                    os._exit(0)
                os.kill(os.getpid(), signal.SIGKILL)
            case Act.DEFINE:
                library, symbol, result_bytes_max = frame.meta.decode().split()
                self.domain.define_native(channel.id, 100, library, symbol, int(result_bytes_max))
                self.send(channel, Kind.RESULT, frame.call_id, 0, b"defined")
            case Act.ABOUT:
                about = f"{frame.kind} {frame.flags} {frame.deadline_ns} {frame.credits} {frame.call_id}"
                self.send(channel, Kind.RESULT, frame.call_id, 0, about.encode())
            case Act.MALFORMED:
                count = getattr(self.domain, "malformed_peers", 0)
                self.send(channel, Kind.RESULT, frame.call_id, 0, str(count).encode())
            case Act.HOLD:
                pass

    def finish(self, die: bool, channel: Channel, frame: Frame, data: tuple[bytes, ...]) -> None:
        self.send(channel, Kind.RESULT, frame.call_id, 0, b"done", data)
        if die:
            os.kill(os.getpid(), signal.SIGKILL)


def main(domain_name: str, address: str, parent: int) -> None:
    domain = open_domain(domain_name)
    print(domain.listen(address, admit), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        Peer(domain).serve(parent)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
