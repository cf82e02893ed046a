"""What one call carries, how its arguments are put on the wire and how its answer reaches whoever waits.

Not here: where it runs (`dispatch.py`), how functions are numbered (`definitions.py`).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from time import monotonic
from typing import Any, NamedTuple, Protocol

from isthmus.core.errors import CodecError
from isthmus.fabric import codec
from isthmus.fabric.channels import Buffer, Frame
from isthmus.sdk.definitions import Definition
from isthmus.sdk.function import FunctionSpec
from isthmus.sdk.futures import Driver, Future
from isthmus.sdk.work import NEVER, Call, Pool

NATIVE_META_BYTES_MAX = (
    4096  # raw arguments up to here travel in-band, larger ones out of band without a copy
)

Encoder = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Buffer, Sequence[Buffer]]]
Decoder = Callable[[Buffer, Buffer | None], Any]


class Items(Protocol):
    """Where the items of a generator go; its end is the end of its future."""

    def put(self, frame: Frame | None) -> None: ...


class Plan(NamedTuple):
    """How calls of one function are made."""

    definition: Definition
    spec: FunctionSpec
    pool: Pool
    encode: Encoder
    decode: Decoder


class Payload:
    """One call's bytes and the one who waits for it."""

    __slots__ = ("data", "decode", "definition", "future", "items", "meta")

    def __init__(self, plan: Plan, meta: Buffer, data: Sequence[Buffer]) -> None:
        self.definition = plan.definition
        self.meta, self.data = meta, data
        self.decode = plan.decode
        self.future: Future[Any] | None = None
        self.items: Items | None = None

    def settle(self, frame: Frame | None, error: BaseException | None) -> None:
        value = None
        if error is None:
            assert frame is not None
            try:
                value = self.decode(frame.meta, frame.data)
            except CodecError as unreadable:
                error = unreadable
        self.meta, self.data = b"", ()  # arguments need not live as long as a kept future
        try:
            self._deliver(value, error)
        except InvalidStateError:
            return  # cancelled or closed at the same moment: its outcome stands

    def _deliver(self, value: Any, error: BaseException | None) -> None:
        future = self.future
        if future is None:
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


def new_call(
    number: int, plan: Plan, payload: Payload, label: int = 0, sent_s: float = 0.0, name: str = ""
) -> Call:
    """One call as the plan's spec has it.

    label   as in `Call`; 0 is shared by all whose time is not worth learning
    sent_s  when it was sent past the scheduler, from where its time limit counts; 0.0: it was not
    name    for messages; "": the function's
    """
    limit_s = plan.spec.timeout_s
    deadline_s = NEVER if limit_s is None else (sent_s or monotonic()) + limit_s
    return Call(
        number, plan.pool, payload, plan.spec.retries, deadline_s, label=label, sent_s=sent_s,
        name=name or plan.definition.name, timeout_s=limit_s,
    )  # fmt: skip


def attach_future(driver: Driver, call: Call, payload: Payload) -> Future[Any]:
    """A new future that gets the call's outcome."""
    future: Future[Any] = Future(driver)
    future.call, payload.future = call, future
    return future


def encode_native(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Buffer, Sequence[Buffer]]:
    """A native function takes one bytes-like argument and gets its bytes as they are."""
    if kwargs or len(args) > 1:
        raise TypeError("a native function takes one bytes-like argument")
    view = memoryview(args[0] if args else b"")
    if view.nbytes <= NATIVE_META_BYTES_MAX:
        return bytes(view), ()
    return b"", (view.cast("B"),)


def decode_native(meta: Buffer, data: Buffer | None) -> Any:
    return bytes(meta) if data is None else bytes(data)


def encode_through(fn: Callable[..., Any]) -> Encoder:
    """For a callable that travels as an argument of `definitions.apply`."""
    return lambda args, kwargs: codec.encode_call((fn, args, kwargs), {})
