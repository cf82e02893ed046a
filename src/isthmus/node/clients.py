"""Connected clients and what each has defined.

A client is met on its first frame. Its functions, actors and groups end with its channel.
Not here: running what was defined (`serving.py`).
"""

import sys
from functools import partial

from isthmus.core.errors import CodecError, FunctionLoadError, InvalidRequestError
from isthmus.fabric.channels import Channel, Domain, Frame
from isthmus.fabric.codec import FunctionHeader, decode_group, decode_header
from isthmus.fabric.natives import NativeFunction
from isthmus.node.functions import Function, Loop
from isthmus.node.groups import Contexts, Switchboard
from isthmus.node.page import CLIENTS, HELD, Page

FUNCTIONS_MAX = 4096  # per client: a table index is cheap, but not free


class Client:
    """One connected client and its function table."""

    __slots__ = ("channel", "contexts", "functions", "send")

    def __init__(self, channel: Channel, contexts: Contexts) -> None:
        self.channel = channel
        self.contexts = contexts
        self.send = channel.send
        self.functions: dict[int, Function] = {}

    def leave(self) -> None:
        """Run what its actors left to do, in order of their making."""
        for function in self.functions.values():
            function.leave()
        self.contexts.close()


class Clients:
    """All of them; `by_channel` is read on the path of every call."""

    def __init__(self, domain: Domain, page: Page, loop: Loop, board: Switchboard) -> None:
        self.by_channel: dict[int, Client] = {}
        self._domain = domain
        self._page = page
        self._loop = loop
        self._board = board

    def meet(self, channel_id: int) -> Client | None:
        """The client behind a channel; None when the channel is gone."""
        client = self.by_channel.get(channel_id)
        if client is None:
            channel = self._domain.channel(channel_id)
            if channel is None:
                return None
            client = self.by_channel[channel_id] = Client(channel, Contexts(self._board))
            self._page[CLIENTS] = len(self.by_channel)
        return client

    def forget(self, channel_id: int) -> None:
        client = self.by_channel.pop(channel_id, None)
        if client is not None:
            client.leave()
        channel = self._domain.channel(channel_id)
        if channel is not None:
            channel.close()
        self._page[CLIENTS] = len(self.by_channel)

    def close(self) -> None:
        for client in self.by_channel.values():
            client.leave()
        self.by_channel.clear()

    def define(self, frame: Frame) -> None:
        """Take a DEFINE. One that cannot be read is noted in the log; its calls will fail by themselves."""
        client = self.meet(frame.channel_id)
        if client is None:
            return
        try:
            header = decode_header(frame.meta)
            if len(client.functions) >= FUNCTIONS_MAX:
                raise InvalidRequestError(f"a client may define {FUNCTIONS_MAX} functions")
            if header.kind == "group":
                client.contexts.define(frame.function_id, decode_group(frame.data or b""))
                return
        except (CodecError, InvalidRequestError) as error:
            print(f"isthmus: ignored a definition: {error}", file=sys.stderr)
            return
        if (former := client.functions.get(frame.function_id)) is not None:
            former.leave()
        if header.kind == "native":
            self._define_native(client, frame, header)
            return
        context = partial(client.contexts.get, header.group) if header.group else None
        row = self._page.add_row(header.name)
        code = frame.data if frame.data is not None else b""
        client.functions[frame.function_id] = Function(header, code, row, self._loop, context, self._hold)

    def _hold(self, change: int) -> None:
        self._page[HELD] += change

    def _define_native(self, client: Client, frame: Frame, header: FunctionHeader) -> None:
        row = self._page.add_row(header.name)
        try:
            self._domain.define_native(
                frame.channel_id, frame.function_id, header.library, header.symbol, header.result_bytes_max,
                self._page.meter(row),
            )  # fmt: skip
            function = Function(header, b"", row, self._loop)
            function.native = NativeFunction(header.library, header.symbol, header.result_bytes_max)
        except FunctionLoadError as error:
            function = Function.broken(header, error, row, self._loop)
        client.functions[frame.function_id] = function
