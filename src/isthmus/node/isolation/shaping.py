"""Bandwidth: what a lease sends by one interface, held to what it asked for.

    root of the interface   HTB 1575:            what belongs to no lease passes it unshaped
      class 1575:N          rate = the lease's
      filter N              a cgroup of version 2 -> class N, named for the lease (`cgroup_filters.py`)

All of it is in the kernel and outlives the agent: its successor finds it by the filters' names. What does not
leave by the interface is not held: RDMA, shared memory, other interfaces; nor what a lease receives.
Invariant: the root is never taken from anybody else; where another shapes already, nothing is done. Agents
share one root and take turns, so that none gives it back while another adds to it.
Source: tc(8), tc-htb(8), tc-bpf(8).
"""

import contextlib
import fcntl
import hashlib
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from isthmus.core.ids import LeaseId
from isthmus.core.model import Enforcement
from isthmus.node.isolation import cgroup_filters, groups
from isthmus.node.isolation.isolation import GROUP_PREFIX, Isolation, Share
from isthmus.node.isolation.layers import Layer, RefusedError, run

KIND = "bandwidth"
HANDLE = 0x1575  # of our root; 0 is the kernel's own
TC_S = 5.0
TURN_S = 5.0  # an agent's turn is a few commands; whoever holds the lock for longer is none
_TURN_POLL_S = 0.005
_NAMESPACE = Path("/proc/self/ns/net")  # all who see an interface see the same one, from any container
BURST_BYTES_MIN = 16 * 2**10  # sent at once after a pause; above it, four milliseconds' worth
NUMBERS_TRIED = 32  # for a class, when others have the first ones
_IS_THERE = ("File exists", "Exclusivity flag on")  # of a class, of a root
_ROOT = re.compile(r"qdisc (\S+) ([0-9a-f]+): root")
_FILTER = re.compile(r"pref (\d+) bpf .*\bflowid [0-9a-f]+:[0-9a-f]+ (\S+)")


class Shaped(Layer):
    """An isolation that also holds leases to their bandwidth; everything else is the inner one's."""

    def __init__(self, inner: Isolation, interface: str, tag: str) -> None:
        super().__init__(inner)
        self._interface = interface
        self._device = ("dev", interface)
        self._prefix = f"{GROUP_PREFIX}{tag}-"
        self._own: Path | None = None  # where groups of ours are, when the inner has none of version 2
        self._shaped: dict[LeaseId, int] = {}  # their classes' numbers
        self._lock = threading.Lock()  # creating and destroying run in threads

    @property
    def enforcement(self) -> Enforcement:
        held = self._inner.enforcement
        words = f"bandwidth is what leaves by {self._interface}; RDMA and shared memory pass it by"
        detail = "; ".join(part for part in (held.detail, words) if part)
        return msgspec.structs.replace(held, amounts={**held.amounts, KIND: "tc-htb"}, detail=detail)

    def probe(self) -> str:
        """Of the shaping only; the inner has been probed. Leaves nothing behind."""
        if shutil.which("tc") is None:
            return "tc is not installed (package iproute2)"
        if self._interface not in (name for _, name in socket.if_nameindex()):
            return f"there is no interface {self._interface!r}"
        mount = groups.mounts().get("")
        if mount is None:
            return "no version 2 hierarchy of cgroups is mounted"
        own = mount / groups.own_group("").lstrip("/")
        self._own = own if own.is_dir() else mount
        group = self._own / f"{self._prefix}shaping-probe"
        try:
            self._shaped = self._found()
            group.mkdir(exist_ok=True)
            try:
                self._shape(LeaseId("probe"), group, 10**6)
            finally:
                self._unshape(LeaseId("probe"))
                groups.remove(group)
        except OSError as error:
            return f"not permitted: {error}"
        return ""

    def create(self, lease: LeaseId, share: Share, reserved: int = 0) -> Enforcement:
        enforcement = self._inner.create(lease, share, reserved)
        rate = dict(share.amounts).get(KIND, 0)
        if rate:
            group = self._group(lease)
            group.mkdir(exist_ok=True)
            self._shape(lease, group, rate)
        return enforcement

    def attach(self, lease: LeaseId, pid: int) -> None:
        """A socket belongs to the group that its maker was in: nothing may be opened before."""
        self._inner.attach(lease, pid)
        if self._inner.group(lease) is None and self._group(lease).exists():
            groups.write(self._group(lease) / "cgroup.procs", pid)

    def destroy(self, lease: LeaseId) -> None:
        self._inner.destroy(lease)
        if lease not in self._shaped:
            return
        self._unshape(lease)
        if self._inner.group(lease) is None and self._group(lease).exists():
            groups.remove(self._group(lease))

    def sweep(self) -> None:
        self._inner.sweep()
        if self._own is not None:
            groups.sweep(self._own, GROUP_PREFIX)

    def remains(self) -> list[LeaseId]:
        return sorted({*self._inner.remains(), *self._shaped})

    # the interface ------------------------------------------------------------------------------------------
    def _group(self, lease: LeaseId) -> Path:
        inner = self._inner.group(lease)
        assert self._own is not None
        return self._own / (self._prefix + lease) if inner is None else inner

    def _shape(self, lease: LeaseId, group: Path, bits_per_s: int) -> None:
        with self._lock:
            if lease in self._shaped:
                return
            with _turn():
                self._take_root()
                number = self._shaped[lease] = self._add_class(lease, bits_per_s)
                cgroup_filters.add(self._interface, HANDLE << 16, number, group, self._prefix + lease)

    def _add_class(self, lease: LeaseId, bits_per_s: int) -> int:
        """Its number."""
        rate = "rate", f"{bits_per_s}bit", "burst", str(max(BURST_BYTES_MIN, bits_per_s // 2000))
        for salt in range(NUMBERS_TRIED):
            number = _number(lease, salt)
            with contextlib.suppress(FileExistsError):
                self._tc("class", "add", *self._device, "parent", f"{HANDLE:x}:",
                         "classid", _class(number), "htb", *rate)  # fmt: skip
                return number
        raise OSError(f"{NUMBERS_TRIED} classes of {self._interface} are taken")

    def _unshape(self, lease: LeaseId) -> None:
        """And give the root back with the last one."""
        with self._lock, _turn():
            number = self._shaped.pop(lease, None)
            if number is not None and self._is_ours():
                with contextlib.suppress(OSError):  # its filter was refused
                    self._tc("filter", "del", *self._device, "parent", f"{HANDLE:x}:", "pref", str(number))
                self._tc("class", "del", *self._device, "classid", _class(number))
            if self._is_ours() and not self._tc("class", "show", *self._device).strip():
                self._tc("qdisc", "del", *self._device, "root")

    def _found(self) -> dict[LeaseId, int]:
        """What an earlier agent of this state directory shaped."""
        if not self._is_ours():
            return {}
        shown = self._tc("filter", "show", *self._device, "parent", f"{HANDLE:x}:")
        return {
            LeaseId(name.removeprefix(self._prefix)): int(number)
            for number, name in _FILTER.findall(shown)
            if name.startswith(self._prefix)
        }

    def _is_ours(self) -> bool:
        return self._root() == ("htb", f"{HANDLE:x}")

    def _root(self) -> tuple[str, str]:
        """(kind, handle) of the interface's root; the kernel's own have handle 0."""
        found = _ROOT.search(self._tc("qdisc", "show", *self._device))
        return (found[1], found[2]) if found is not None else ("", "0")

    def _take_root(self) -> None:
        kind, handle = self._root()
        if self._is_ours():
            return
        if handle != "0":
            raise OSError(f"{self._interface} has a root queue of somebody else ({kind} {handle}:)")
        with contextlib.suppress(FileExistsError):  # another agent was faster
            self._tc("qdisc", "add", *self._device, "root", "handle", f"{HANDLE:x}:", "htb")

    def _tc(self, *words: str) -> str:
        """Raises OSError; FileExistsError for what is there already."""
        try:
            return run("tc", *words, limit_s=TC_S)
        except RefusedError as error:
            if any(words in error.complaint for words in _IS_THERE):
                raise FileExistsError(str(error)) from error
            raise


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """Anybody may hold this lock, and no stranger may stop leases with it: after TURN_S we go on without."""
    with _NAMESPACE.open() as namespace:
        until = time.monotonic() + TURN_S
        while time.monotonic() < until:
            try:
                fcntl.flock(namespace, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_TURN_POLL_S)
            else:
                break
        yield


def _class(number: int) -> str:
    return f"{HANDLE:x}:{number:x}"


def _number(lease: LeaseId, salt: int) -> int:
    """1..65534, for a class and its filter."""
    digest = hashlib.blake2b(f"{lease} {salt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 0xFFFE + 1
