"""How an exception travels: itself, if it can be pickled, and always its text and traceback.

`meta` is `EXCEPTION` and msgpack Report; a long pickle is the data. Where Python is not at hand (a native
function), it is `WORDS` and `ClassName: message` as UTF-8, with a class of core.errors."""

import traceback

import msgspec

from isthmus.core import errors
from isthmus.core.errors import CodecError, IsthmusError, RemoteError
from isthmus.fabric import _pickles
from isthmus.fabric._buffers import Buffer, Encoded, Region

EXCEPTION, WORDS = b"\x10", b"\x11"
TEXT_CHARS_MAX = 200_000
_PICKLE_BYTES_MAX = 32768


class RemoteTraceback(Exception):
    """The traceback of the other process, as text. It is the `__cause__` of what a call raises."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class Report(msgspec.Struct, frozen=True, array_like=True):
    """pickled   the exception; its length, if it lies in the data; None, if it cannot be pickled"""

    kind: str
    message: str
    text: str
    pickled: bytes | int | None


_encode = msgspec.msgpack.Encoder().encode
_report = msgspec.msgpack.Decoder(Report)


def encode_error(error: BaseException) -> Encoded:
    """Never fails: an exception that cannot travel is reported by its text."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    stream = _pickled(error)
    long = stream is not None and len(stream) > _PICKLE_BYTES_MAX
    report = Report(kind, _message(error), _traceback(error), len(stream) if stream and long else stream)
    return Encoded(EXCEPTION + _encode(report), (stream,) if stream and long else ())


def encode_words(kind: type[IsthmusError], message: str) -> Encoded:
    """An error of ours without a traceback: what a domain answers by itself."""
    return Encoded(WORDS + f"{kind.__name__}: {message}".encode("utf-8", "backslashreplace"), ())


def decode_exception(body: Buffer, region: Region) -> BaseException:
    try:
        report = _report.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(f"not an encoded exception: {error}") from error
    exception = _rebuilt(report, region)
    exception.__cause__ = RemoteTraceback(report.text)
    return exception


def decode_words(body: bytes) -> BaseException:
    name, _, message = body.decode("utf-8", "replace").partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, IsthmusError):
        return kind(message)
    return RemoteError(f"{name}: {message}")


def _rebuilt(report: Report, region: Region) -> BaseException:
    if report.pickled is None:
        return RemoteError(f"{report.kind}: {report.message} (it could not be pickled where it was raised)")
    stream = report.pickled if isinstance(report.pickled, bytes) else region.part(0, report.pickled)
    try:
        exception = _pickles.loads(stream)
    except CodecError as error:
        return RemoteError(f"{report.kind}: {report.message} (it cannot be rebuilt here: {error.__cause__})")
    if not isinstance(exception, BaseException):
        return RemoteError(f"{report.kind}: {report.message}")
    return exception


def _pickled(error: BaseException) -> bytes | None:
    try:
        return _pickles.dumps(error)
    except Exception:  # the exception's own code failed; its text still travels
        return None


def _message(error: BaseException) -> str:
    try:
        return _clean(str(error))
    except Exception as second:  # a broken __str__ must not hide the error
        return f"<its __str__ failed: {type(second).__name__}>"


def _traceback(error: BaseException) -> str:
    return _clean("".join(traceback.format_exception(error)))


def _clean(text: str) -> str:
    """Without lone surrogates, which UTF-8 cannot hold, and of bounded length: begin and end tell most."""
    if len(text) > TEXT_CHARS_MAX:
        half = TEXT_CHARS_MAX // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()
