"""The native shortcuts of the codec, or nothing in their place where they were not built.

Invariant: a decorated function gives what it gave, sooner. Only small builtin values are taken from it.
"""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def _unchanged(otherwise: F) -> F:
    return otherwise


try:
    from isthmus.fabric import _plain
except ImportError:
    decode_call = decode_value = pack_call = pack_value = _unchanged
else:
    decode_call, decode_value = _plain.decode_call, _plain.decode_value
    pack_call, pack_value = _plain.pack_call, _plain.pack_value

__all__ = ["decode_call", "decode_value", "pack_call", "pack_value"]
