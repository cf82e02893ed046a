"""Sizes as people write them, turned into numbers once, at the edge; numbers as people read them."""

import functools
import re

CHARACTERS_MAX = 40  # of a size: more digits are a mistake, and texts are remembered
_BYTES = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(bit|B)/s\s*")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def parse_bytes(text: str | int) -> int:
    """`"2GiB"`, `"512 MB"`, `"4096"` or an int, in bytes. Raises ValueError with the accepted forms.

    Remembered: every open lease's size is asked for with every decision.
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative: {text}")
        return text
    match = _SIZE.fullmatch(text) if len(text) <= CHARACTERS_MAX else None
    if match is None:
        raise ValueError(
            f"not a size: {text[:CHARACTERS_MAX]!r}; write for example '512MiB', '2GiB' or '1.5TB'"
        )
    return int(float(match[1]) * _BYTES[(match[2] or "").upper()])


@functools.lru_cache(maxsize=4096)
def parse_rate(text: str | int) -> int:
    """`"2Gbit/s"`, `"250 MB/s"` or an int, in bits per second. Raises ValueError with the accepted forms."""
    if isinstance(text, int) or text.isdecimal():
        return parse_bytes(text if isinstance(text, int) else int(text[:CHARACTERS_MAX]))
    match = _RATE.fullmatch(text) if len(text) <= CHARACTERS_MAX else None
    if match is None:
        raise ValueError(f"not a rate: {text[:CHARACTERS_MAX]!r}; write for example '500Mbit/s' or '2Gbit/s'")
    return int(float(match[1]) * _BYTES[match[2].upper()] * (1 if match[3] == "bit" else 8))


def format_rate(bits_per_s: float) -> str:
    value = bits_per_s
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:g} {unit}bit/s"
        value /= 1000
    return f"{value:g} Tbit/s"


def format_bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
