"""A small real site for agents, and a small real client for executors, as the tests of the node need them."""

import hashlib
import hmac
import itertools
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

import isthmus.fabric
from isthmus.core import tokens
from isthmus.core.ids import LeaseId, NodeId, TenantId
from isthmus.core.model import ISTHMUS_VERSION, Environment, LeaseClass, Resources, python_version
from isthmus.fabric.channels import Channel, Frame
from isthmus.fabric.codec import (
    FunctionHeader,
    decode_error,
    decode_value,
    encode_call,
    encode_function,
    encode_header,
    function_kind,
)
from isthmus.fabric.frames import Hello, Kind
from isthmus.node import messages
from isthmus.node.isolation import groups, state_tag
from isthmus.node.messages import (
    AgentHello,
    AnyMessage,
    Challenge,
    Done,
    Failed,
    LeaseEnded,
    Order,
    SiteHello,
    StartLease,
)
from isthmus.node.socket_paths import short_directory

SITE_KEY = b"k" * 32
NODE = NodeId("n1")
ANSWER_S = 30.0


class Site:
    """Speaks `node.messages` with one agent; keeps what it reports."""

    def __init__(self, join_key: bytes, orphan_s: float = 0.0, port: int = 0) -> None:
        self.join_key = join_key
        self.orphan_s = orphan_s
        self.reports: list[AnyMessage] = []
        self.hellos: list[AgentHello] = []
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._answers: dict[int, Done | Failed] = {}
        self._connection: ServerConnection | None = None
        self._server: Server = serve(self._handle, "127.0.0.1", port, compression=None)
        self.port = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/agent"

    def order(self, kind: type[Order], **fields: Any) -> Done | Failed:
        """Give one order and wait for its answer."""
        self.wait(lambda: self._connection is not None)
        number = next(self._numbers)
        assert self._connection is not None
        now = {"now_s": time.time()} if "deadline_s" in fields else {}
        self._connection.send(messages.encode(kind(number=number, **now, **fields)))
        self.wait(lambda: number in self._answers)
        return self._answers[number]

    def done(self, kind: type[Order], **fields: Any) -> Done:
        answer = self.order(kind, **fields)
        assert isinstance(answer, Done), answer
        return answer

    def wait(self, condition: Callable[[], Any], timeout_s: float = ANSWER_S) -> Any:
        with self._changed:
            result = self._changed.wait_for(condition, timeout_s)
        assert result, f"not so after {timeout_s} s; reports: {self.reports[-3:]}"
        return result

    def wait_report(self, kind: type, timeout_s: float = ANSWER_S, **fields: Any) -> Any:
        """The first report of this kind with these fields."""

        def find() -> Any:
            for report in self.reports:
                if isinstance(report, kind) and all(getattr(report, name) == fields[name] for name in fields):
                    return report
            return None

        return self.wait(find, timeout_s)

    def close(self) -> None:
        self._server.shutdown()
        if self._connection is not None:
            self._connection.close()
        self._thread.join()

    def _handle(self, connection: ServerConnection) -> None:
        nonce = secrets.token_bytes(32)
        try:
            connection.send(messages.encode(Challenge(nonce=nonce)))
            hello = messages.decode(connection.recv())
            assert isinstance(hello, AgentHello)
            expected = hmac.digest(self.join_key, b"agent" + nonce + hello.nonce, hashlib.sha256)
            proof = hmac.digest(self.join_key, b"site" + hello.nonce + nonce, hashlib.sha256)
            with self._changed:
                self.hellos.append(hello)
                self._changed.notify_all()
            if not hmac.compare_digest(expected, hello.proof):
                return
            connection.send(messages.encode(SiteHello(proof=proof, orphan_s=self.orphan_s)))
            self._note(lambda: setattr(self, "_connection", connection))
            for data in connection:
                self._take(messages.decode(data))
        except ConnectionClosed:
            pass
        finally:
            if self._connection is connection:
                self._note(lambda: setattr(self, "_connection", None))

    def _take(self, message: AnyMessage) -> None:
        if isinstance(message, Done | Failed):
            self._note(lambda: self._answers.__setitem__(message.number, message))
        else:
            self._note(lambda: self.reports.append(message))

    def _note(self, change: Callable[[], Any]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


class Agent:
    """One agent process. `kill` is SIGKILL: its executors must survive that."""

    def __init__(self, site: Site, state: Path, parent: int | None = None, **settings: Any) -> None:
        settings = {"meter_s": 0.1, **settings}
        environ = dict(os.environ, ISTHMUS_AGENT_KEY=site.join_key.hex())
        environ["ISTHMUS_AGENT_SETTINGS"] = msgspec.json.encode(settings).decode()
        command = [sys.executable, "-m", "isthmus.node.agent", "--site", site.url, "--node", NODE]
        command += ["--state", str(state), "--cache", str(state / "cache")]
        if parent is not None:
            command += ["--parent", str(parent)]
        self.state = state
        self.process = subprocess.Popen(command, env=environ)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it in order; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def start_lease(site: Site, lease: str, **fields: Any) -> Any:
    """The first executor of a new lease of one core."""
    return site.done(StartLease, **lease_order(lease, **fields)).executor


def lease_order(lease: str, **fields: Any) -> dict[str, Any]:
    return {
        "lease": LeaseId(lease),
        "tenant": TenantId("t"),
        "resources": Resources(cores=1, memory="512MiB"),
        "lease_class": LeaseClass.ELASTIC,
        "environment": Environment(),
        "lease_key": tokens.lease_key(SITE_KEY, LeaseId(lease)),
        "deadline_s": time.time() + 60,
        **fields,
    }


def token(lease: str, expires_in_s: float = 60.0) -> str:
    claims = tokens.Claims(
        lease=LeaseId(lease), tenant=TenantId("t"), node=NODE, expires_s=time.time() + expires_in_s
    )
    return tokens.sign(claims, tokens.lease_key(SITE_KEY, LeaseId(lease)))


def hello(lease: str, **fields: Any) -> Hello:
    return Hello(**{"token": token(lease), "python": python_version(), "isthmus": ISTHMUS_VERSION, **fields})


class Client:
    """One channel to one executor; values in, values out."""

    def __init__(self, address: str, lease: str, domain: str = "auto") -> None:
        self.domain = isthmus.fabric.open_domain(domain)
        self.channel: Channel = self.domain.connect(address, hello(lease))
        self._numbers = itertools.count(1)
        self._waiting: dict[int, list[Frame]] = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.domain.close()

    def define(self, function: Any, name: str = "", **fields: Any) -> int:
        number = next(self._numbers)
        kind = fields.pop("kind", None) or function_kind(function)
        header = FunctionHeader(name=name or getattr(function, "__name__", "?"), kind=kind, **fields)
        code = encode_function(function) if function is not None else b""
        assert self.channel.send(Kind.DEFINE, 0, number, encode_header(header), [code])
        return number

    def start(self, function: int, *args: Any, credits: int = 0, deadline_ns: int = 0, **kwargs: Any) -> int:
        """Send a call; its id."""
        number = next(self._numbers)
        meta, data = encode_call(args, kwargs)
        self.send(Kind.CALL, number, function, meta, data, credits=credits, deadline_ns=deadline_ns)
        return number

    def send(self, kind: int, call: int, function: int, meta: bytes, data: Any, **fields: int) -> None:
        while not self.channel.send(kind, call, function, meta, data, **fields):
            self._pump(0.01)

    def frame(self, call: int, timeout_s: float = ANSWER_S) -> Frame:
        """The next frame that answers a call, or the LOST of its channel."""
        deadline_s = time.monotonic() + timeout_s
        while not self._waiting.get(call):
            if self._waiting.get(-1):
                return self._waiting[-1][0]
            assert time.monotonic() < deadline_s, f"no answer after {timeout_s} s"
            self._pump(0.05)
        return self._waiting[call].pop(0)

    def result(self, call: int, timeout_s: float = ANSWER_S) -> Any:
        """The value of a call, or its exception raised."""
        frame = self.frame(call, timeout_s)
        if frame.kind == Kind.RESULT:
            return decode_value(frame.meta, frame.data)
        if frame.kind in (Kind.ERROR, Kind.REFUSED):
            raise decode_error(frame.meta, frame.data)
        raise ConnectionError(f"frame of kind {Kind(frame.kind).name}: {bytes(frame.meta)!r}")

    def call(self, function: int, *args: Any, **kwargs: Any) -> Any:
        return self.result(self.start(function, *args, **kwargs))

    def cancel(self, call: int, reason: bytes = b"cancel") -> None:
        self.channel.send_urgent(Kind.CANCEL, call, reason)

    def items(self, call: int, credits: int) -> Iterator[Any]:
        """The items of a stream, each acknowledged once taken."""
        while (frame := self.frame(call)).kind == Kind.YIELD:
            yield decode_value(frame.meta, frame.data)
            self.send(Kind.YIELD, call, 0, b"", [], credits=1)
        if frame.kind != Kind.RESULT:
            raise decode_error(frame.meta, frame.data)

    def _pump(self, timeout_s: float) -> None:
        frame = self.domain.poll(timeout_s)
        if frame is not None:
            self._waiting.setdefault(-1 if frame.kind == Kind.LOST else frame.call_id, []).append(frame)


def ended(site: Site, lease: str) -> LeaseEnded:
    return site.wait_report(LeaseEnded, lease=lease)  # type: ignore[no-any-return]


@contextmanager
def running_node(state: Path, **settings: Any) -> Iterator[tuple[Site, Agent]]:
    """A site and its agent; leaves no process, cgroup or socket behind, and checks that."""
    site = Site(secrets.token_bytes(32), orphan_s=settings.pop("orphan_s", 0.0))
    agent = Agent(site, state, **settings)
    try:
        site.wait(lambda: site.hellos)
        yield site, agent
    finally:
        if agent.process.poll() is None:
            agent.stop()
        site.close()
    found = remains(state)
    assert not found, f"left behind: {found}"


def remains(state: Path) -> list[str]:
    """What an agent that ended in order may not leave: cgroups, sockets, lease directories, processes."""
    found = [
        str(path) for base in groups.mounts().values() for path in base.rglob(f"isthmus-{state_tag(state)}-*")
    ]
    found += [str(path) for path in (state / "leases").iterdir()]
    found += [str(path) for path in (short_directory(state),) if path.exists()]
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes()
        except OSError:
            continue
        if str(state).encode() in words:
            found.append(f"process {cmdline.parent.name}")
    return found
