"""Kinds of resources beyond cores, memory and GPUs: each has a name, and is counted, limited, billed and
explained by it, everywhere alike.

    bandwidth       of a node: bits per second that leave it
    cache           of a node: bytes on its own disk
    licenses.NAME   site-wide: so many in all, on whatever node they are used

What a lease, a node, a tenant or a bill has of them is `amounts`: {kind: how much}, without what it has none
of. A further kind is a field where people write it (`Asked`, `rules.Cap`, settings) and a line here.
Not here: whether anything holds a lease to what it asked for (`model.Enforcement`).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from isthmus.core.units import format_bytes, format_rate, parse_bytes, parse_rate

LICENSES_MAX = 32  # names in one request or limit
COUNT_MAX = 10**9  # of cores, GPUs, leases, licences: far beyond any machine, so that sums fit into 64 bits
RATE_MAX = 10**15  # bits per second
CACHE_BYTES_MIN, CACHE_BYTES_MAX = 16 * 2**20, 2**56  # a file system has its own tables
OF_NODES = ("bandwidth", "cache")
_PREFIX = "licenses."
_LICENSE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,99}")  # it becomes a word of Slurm's command line

Number = TypeVar("Number", int, float)
Licenses = Annotated[dict[str, Annotated[int, Meta(ge=0, le=COUNT_MAX)]], Meta(max_length=LICENSES_MAX)]
HeldBy = Literal["tc-htb", "loop-mount", "slurm", "accounted-only"]


class Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is written of further kinds, in requests and limits; 0 or left away: none, or no limit.

    bandwidth  bits per second, as text like "2Gbit/s" or as an int
    cache      bytes, as text like "200GiB" or as an int
    licenses   {name: how many}
    """

    bandwidth: str | int = 0
    cache: str | int = 0
    licenses: Licenses = {}

    def __post_init__(self) -> None:
        check(self.licenses, self.bandwidth, self.cache)

    @property
    def amounts(self) -> dict[str, int]:
        return amounts(self.licenses, self.bandwidth, self.cache)


class Stock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a site-wide kind: how many there are in all, and how many are in others' hands than this site's."""

    total: int
    others: int = 0


def check(licenses: Mapping[str, int], bandwidth: str | int = 0, cache: str | int = 0) -> None:
    """Raises ValueError with what is wrong."""
    if parse_rate(bandwidth or 0) > RATE_MAX:
        raise ValueError(f"bandwidth={bandwidth!r} is more than any network has")
    size_bytes = parse_bytes(cache or 0)
    if size_bytes and not CACHE_BYTES_MIN <= size_bytes <= CACHE_BYTES_MAX:
        raise ValueError(f"cache={cache!r}; ask for at least 16MiB, and no more than disks have")
    for name, count in licenses.items():
        if not _LICENSE.fullmatch(name):
            raise ValueError(f"{name[:100]!r} cannot be the name of a licence; write for example 'matlab'")
        if not 0 <= count <= COUNT_MAX:
            raise ValueError(f"licenses: {count} of {name!r}; ask for 0 to {COUNT_MAX}")


def amounts(licenses: Mapping[str, int], bandwidth: str | int = 0, cache: str | int = 0) -> dict[str, int]:
    if not (licenses or bandwidth or cache):
        return {}
    found = {_PREFIX + name: count for name, count in licenses.items()}
    found |= {"bandwidth": parse_rate(bandwidth or 0), "cache": parse_bytes(cache or 0)}
    return {kind: amount for kind, amount in found.items() if amount}


def is_site_wide(kind: str) -> bool:
    return kind.startswith(_PREFIX)


def of_node(amounts: Mapping[str, int]) -> dict[str, int]:
    """Those of them that are not site-wide."""
    return {kind: amount for kind, amount in amounts.items() if not is_site_wide(kind)}


def license_of(kind: str) -> str:
    return kind.removeprefix(_PREFIX)


def noun(kind: str) -> str:
    """What there are `number`s of, for people."""
    return f"{license_of(kind)!r} licences" if is_site_wide(kind) else f"of {kind}"


def number(kind: str, amount: float) -> str:
    match kind:
        case "bandwidth":
            return format_rate(amount)
        case "cache":
            return format_bytes(int(amount))
        case _:
            return f"{amount:g}"


def in_words(amounts: Mapping[str, int]) -> list[str]:
    """`2 'matlab' licences`, ..."""
    return [f"{number(kind, amount)} {noun(kind)}" for kind, amount in amounts.items()]


def sums(one: Mapping[str, Number], other: Mapping[str, Number], sign: int = 1) -> dict[str, Number]:
    """one + sign * other, without what is 0 then."""
    if not other:
        return dict(one) if one else {}
    found = dict(one)
    for kind, amount in other.items():
        found[kind] = found.get(kind, amount - amount) + sign * amount
    return {kind: amount for kind, amount in found.items() if amount}
