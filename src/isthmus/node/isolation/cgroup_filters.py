"""A filter of the kernel's traffic control that matches what one cgroup of version 2 sends.

The filter is a program of eight instructions (eBPF) that asks the kernel whether a packet's socket belongs to
a group or to one below it. Nothing is pinned or remembered: program and map live as long as the filter.
Needs CAP_BPF and CAP_NET_ADMIN, in effect root. Everything raises OSError with the step that was refused.
Source: bpf(2); bpf-helpers(7), bpf_skb_under_cgroup; linux/pkt_cls.h, TCA_BPF_*.
"""

import ctypes
import os
import platform
import socket
import struct
from pathlib import Path

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD = 0, 2, 5
_MAP_OF_CGROUPS, _PROG_SCHED_CLS = 8, 3
_SKB_UNDER_CGROUP = 33

_RTM_NEWTFILTER = 44
_REQUEST_ACK_CREATE = 0x1 | 0x4 | 0x400 | 0x200  # and not if it is there: NLM_F_EXCL
_NLMSG_ERROR = 2
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_CLASSID, _TCA_BPF_FD, _TCA_BPF_NAME = 3, 6, 7
_ALL_PROTOCOLS = socket.htons(0x0003)


def add(interface: str, parent: int, priority: int, group: Path, name: str) -> None:
    """Send what the group sends into the class `parent`'s major:`priority`, by a filter of this name.

    parent     handle of the queueing discipline: major number << 16
    priority   1..65535, of no other filter there; also the class's minor number
    raises     FileExistsError when there is one of this priority, OSError
    """
    table = _call(_MAP_CREATE, struct.pack("=IIII", _MAP_OF_CGROUPS, 4, 4, 1), "a map of cgroups")
    try:
        _put(table, group)
        program = _load(table)
        try:
            _attach(interface, parent, priority, program, name)
        finally:
            os.close(program)
    finally:
        os.close(table)


def _put(table: int, group: Path) -> None:
    directory = os.open(group, os.O_RDONLY | os.O_DIRECTORY)
    try:
        key, value = ctypes.c_uint32(0), ctypes.c_uint32(directory)
        pointers = ctypes.addressof(key), ctypes.addressof(value)
        _call(_MAP_UPDATE, struct.pack("=IIQQQ", table, 0, *pointers, 0), f"{group} in a map of cgroups")
    finally:
        os.close(directory)


def _load(table: int) -> int:
    """The program: -1 (the filter's class) for packets of the group, 0 (no match) for others."""
    code = b"".join(
        (
            _instruction(0x18, 0x12, 0, table),  # r2 = the map
            _instruction(0x00, 0x00, 0, 0),
            _instruction(0xB7, 0x03, 0, 0),  # r3 = 0, its first entry
            _instruction(0x85, 0x00, 0, _SKB_UNDER_CGROUP),
            _instruction(0x15, 0x00, 2, 1),  # if r0 == 1, skip two
            _instruction(0xB7, 0x00, 0, 0),
            _instruction(0x95, 0x00, 0, 0),
            _instruction(0xB7, 0x00, 0, -1),
            _instruction(0x95, 0x00, 0, 0),
        )
    )
    instructions, license_name = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"Apache-2.0")
    body = struct.pack(
        "=IIQQIIQII", _PROG_SCHED_CLS, len(code) // 8, ctypes.addressof(instructions),
        ctypes.addressof(license_name), 0, 0, 0, 0, 0,
    )  # fmt: skip
    return _call(_PROG_LOAD, body, "a filter program")


def _instruction(code: int, registers: int, offset: int, immediate: int) -> bytes:
    return struct.pack("=BBhi", code, registers, offset, immediate)


def _call(command: int, body: bytes, what: str) -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(f"the number of bpf(2) on {platform.machine()} is not known here")
    attributes = ctypes.create_string_buffer(body.ljust(128, b"\0"), 128)
    libc = ctypes.CDLL(None, use_errno=True)
    found = int(libc.syscall(number, command, attributes, 128))
    if found < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"the kernel takes no {what}: {os.strerror(error)}")
    return found


def _attach(interface: str, parent: int, priority: int, program: int, name: str) -> None:
    options = (
        _attribute(_TCA_BPF_FD, struct.pack("=I", program))
        + _attribute(_TCA_BPF_NAME, name.encode() + b"\0")
        + _attribute(_TCA_BPF_CLASSID, struct.pack("=I", parent | priority))
    )
    index = socket.if_nametoindex(interface)
    header = struct.pack("=BxxxiIII", 0, index, 0, parent, priority << 16 | _ALL_PROTOCOLS)
    body = header + _attribute(_TCA_KIND, b"bpf\0") + _attribute(_TCA_OPTIONS, options)
    message = struct.pack("=IHHII", 16 + len(body), _RTM_NEWTFILTER, _REQUEST_ACK_CREATE, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as line:
        line.bind((0, 0))
        line.send(message)
        answer = line.recv(65536)
    _, kind, _, _, _ = struct.unpack_from("=IHHII", answer)
    error = -struct.unpack_from("=i", answer, 16)[0] if kind == _NLMSG_ERROR else 0
    if error:
        raise OSError(error, f"no filter on {interface}: {os.strerror(error)}")


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
