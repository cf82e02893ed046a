"""Build the guest's first file system: busybox, kernel modules in loading order, and the `init` script.

Invariant: pure functions of files; an archive is the same bytes for the same input, so it can be cached.
Not here: starting the machine (`machine.py`).
"""

import re
from collections.abc import Iterable
from pathlib import Path

MODULES = (
    "virtio_pci", "virtio_net", "veth", "9pnet_virtio", "9p", "overlay",
    "crc32_generic", "crc32c_generic", "ib_uverbs", "rdma_ucm", "rdma_rxe",
)  # fmt: skip


def modules_in_order(kernel: Path) -> list[Path]:
    """The files of MODULES and of all they depend on, each after its own dependencies."""
    files = {path.stem.replace("-", "_"): path for path in (kernel / "lib/modules").rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name)
        if path is None or path in order:  # not a file: built into the kernel
            return
        for dependency in _dependencies(path):
            add(dependency)
        order.append(path)

    for name in MODULES:
        add(name)
    return order


def _dependencies(module: Path) -> list[str]:
    """What the module's own .modinfo section names: `depends=a,b` and `softdep=pre: c`."""
    content = module.read_bytes()
    hard = re.findall(rb"\0depends=([\w,-]*)\0", content)
    soft = re.findall(rb"\0softdep=pre: ([\w -]*)\0", content)
    names = b",".join(hard).split(b",") + b" ".join(soft).split()
    return [name.decode().replace("-", "_") for name in names if name]


def archive(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive ("newc"): (path, mode with file type, content) each. Parents must come before children.

    Archives can be concatenated; the kernel unpacks one after the other.
    """
    parts = bytearray()
    for number, (name, mode, content) in enumerate((*files, ("TRAILER!!!", 0, b"")), start=1):
        path = name.encode() + b"\0"
        numbers = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        parts += b"070701" + b"".join(b"%08X" % value for value in numbers) + path
        parts += b"\0" * (-len(parts) % 4) + content
        parts += b"\0" * (-len(parts) % 4)
    parts += b"\0" * (-len(parts) % 512)
    return bytes(parts)


def base(busybox: Path, kernel: Path, init: Path) -> bytes:
    """Everything that stays the same from run to run."""
    folders = ("bin", "modules", "proc", "sys", "dev", "host", "fabric", "top", "root")
    order = modules_in_order(kernel)
    return archive([
        *((name, 0o40755, b"") for name in folders),
        ("init", 0o100755, init.read_bytes()),
        ("bin/busybox", 0o100755, busybox.read_bytes()),
        ("modules/order", 0o100644, "".join(f"{path.name}\n" for path in order).encode()),
        *((f"modules/{path.name}", 0o100644, path.read_bytes()) for path in order),
    ])  # fmt: skip
