"""Read `#ISTHMUS` lines of batch scripts. Pure.

    #ISTHMUS lend cores=auto memory=4GiB

As with #SBATCH, they stand before the first command, in scripts of any language whose comments begin with #.
"""

from isthmus.core.model import Record
from isthmus.core.units import parse_bytes

MARK = "#ISTHMUS"
KEYS = ("cores", "memory")


class Lend(Record, frozen=True):
    """What a job lends while it is idle. `auto`: all that it holds; line: where its script says so."""

    line: int
    cores: str = "auto"
    memory: str = "auto"


class DirectiveError(ValueError):
    """A line that means nothing; the message begins with its number."""


def lend_of(script: str) -> Lend | None:
    """What this script lends; None: nothing. Raises DirectiveError."""
    found: Lend | None = None
    is_header = True
    for number, line in enumerate(script.splitlines(), 1):
        if not _is_directive(line):
            is_header = is_header and (not line.strip() or line.lstrip().startswith("#"))
            continue
        if not is_header:
            raise DirectiveError(
                f"line {number}: {MARK} lines stand before the first command, like #SBATCH's"
            )
        if found is not None:
            raise DirectiveError(f"line {number}: line {found.line} says already what is lent")
        found = _lend(number, line.split()[1:])
    return found


def _is_directive(line: str) -> bool:
    return line.split(maxsplit=1)[:1] == [MARK] and line.startswith(MARK)


def _lend(number: int, words: list[str]) -> Lend:
    if words[:1] != ["lend"]:
        raise DirectiveError(f"line {number}: {MARK} {' '.join(words[:1])} is not known; it can only lend")
    values: dict[str, str] = {}
    for word in words[1:]:
        key, has_value, value = word.partition("=")
        if key not in KEYS or not has_value:
            raise DirectiveError(
                f"line {number}: {word!r} is not known; there are {' and '.join(KEYS)}=VALUE"
            )
        if key in values:
            raise DirectiveError(f"line {number}: {key} is there twice")
        values[key] = value
    lend = Lend(line=number, **values)
    if lend.cores != "auto" and not (lend.cores.isdecimal() and int(lend.cores[:9]) > 0):
        raise DirectiveError(f"line {number}: cores={lend.cores} is neither auto nor a number of cores")
    try:
        if lend.memory != "auto":
            parse_bytes(lend.memory)
    except ValueError as error:
        raise DirectiveError(f"line {number}: memory: {error}") from error
    return lend
