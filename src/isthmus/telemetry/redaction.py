"""Keep secrets out of everything that is written: API keys, lease tokens, bearers, join keys.

Works on text and on log events of any nesting; what a field is called counts as much as what it looks like.
"""

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

REDACTED = "[redacted]"
_DEPTH_MAX = 8

_SECRET_FIELDS = re.compile(
    r"secret|token|api_key|join_key|lease_key|site_key|authorization|password|proof", re.I
)
_SECRET_TEXT = re.compile(
    r"isk_[0-9A-Za-z_-]{8,}"  # API keys
    r"|lease:ls_\w+:[\w.-]+"  # a lease token as bearer
    r"|\b[\w-]{24,}\.[\w-]{43}\b"  # a lease token: claims and signature
    r"|(?<=[Bb]earer )\S+"
)


def redact_text(text: str) -> str:
    return _SECRET_TEXT.sub(REDACTED, text)


def redact_event(logger: object, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """A structlog processor."""
    return {name: _redact(name, value, _DEPTH_MAX) for name, value in event.items()}


def _redact(name: str, value: Any, depth: int) -> Any:
    if _SECRET_FIELDS.search(name) and value:
        return REDACTED
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if depth == 0:
        return redact_text(repr(value))
    if isinstance(value, Mapping):
        return {str(key): _redact(str(key), item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_redact(name, item, depth - 1) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else redact_text(str(value))
