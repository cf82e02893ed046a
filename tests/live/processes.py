"""What descends from a process. Any of it may end while we look: then it counts as gone."""

from pathlib import Path


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in descendants(child)]


def running_below(pid: int, name: bytes) -> list[int]:
    """Its descendants whose command begins with the name."""
    return [child for child in descendants(pid) if _command(child).startswith(name)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
