"""Every error that isthmus raises on purpose, as one tree.

    IsthmusError                      .retryable: may the same call succeed later, unchanged?
    ├── SettingsError                 a settings file or variable is wrong
    ├── PolicyError                   a policy file is wrong; names the file and line
    ├── AuthError                     no key, an unknown key, or a bad lease token
    │   └── TokenError                forged, expired or foreign lease token
    ├── PermissionDeniedError         a known caller may not do this
    ├── NotFoundError                 no such lease, call, node, ...
    ├── InvalidRequestError           what was sent makes no sense
    ├── DeniedError                   policy or quota says no
    ├── NoCapacityError               nothing free now                                     (retryable)
    ├── SiteUnavailableError          the site does not answer                             (retryable)
    ├── LeaseEndedError               the lease is over
    │   └── EvictedError              its owner woke up or policy took it back             (retryable)
    ├── FabricError                   the data plane failed
    │   ├── FrameError                bytes that are no frame
    │   ├── HandshakeError            the peer refused us or speaks another version
    │   └── PeerLostError             the peer died or the link broke                      (retryable)
    ├── CodecError                    a value that cannot be sent or read
    ├── FunctionLoadError             the function cannot be rebuilt on the executor
    ├── CallError                     a call did not end with the function's own result
    │   ├── CallTimeoutError          its timeout_s passed   (is also a TimeoutError)
    │   ├── CallCancelledError        it was cancelled       (is also a CancelledError of concurrent.futures)
    │   ├── ExecutorLostError         the process that ran it died: exit code or signal
    │   │   └── MemoryLimitError      ... because it went over its lease's memory
    │   └── RemoteError               an exception that could not travel; carries its text
    └── MapError                      several calls of a map failed; carries them all

What the function itself raises comes back as itself, with the remote traceback as its `__cause__`.
"""

import concurrent.futures
from typing import ClassVar


class IsthmusError(Exception):
    """Root of the tree. The message says what happened, with values, and what to do."""

    retryable: ClassVar[bool] = False


class SettingsError(IsthmusError):
    """A settings file or variable is wrong; the message names its path."""


class PolicyError(IsthmusError):
    """A policy file is wrong; the message names the file and line."""


class AuthError(IsthmusError):
    """No key, an unknown or revoked key, or a bad lease token."""


class TokenError(AuthError):
    """A lease token that is forged, expired, or bound to another lease or node."""


class PermissionDeniedError(IsthmusError):
    """The caller is known, but may not do this."""


class NotFoundError(IsthmusError):
    """What was named does not exist, or belongs to somebody else."""


class InvalidRequestError(IsthmusError):
    """The request makes no sense as sent."""


class DeniedError(IsthmusError):
    """Policy or quota says no; `isthmus explain` tells which rule."""


class NoCapacityError(IsthmusError):
    """Nothing that fits is free now."""

    retryable = True


class SiteUnavailableError(IsthmusError):
    """The site does not answer. Open leases go on; new ones cannot be had."""

    retryable = True


class LeaseEndedError(IsthmusError):
    """The lease under which this ran is over."""


class EvictedError(LeaseEndedError):
    """The lease was taken back. The call is retried elsewhere without charging the retry budget."""

    retryable = True


class FabricError(IsthmusError):
    """The data plane failed."""


class FrameError(FabricError):
    """Bytes that are no frame."""


class HandshakeError(FabricError):
    """The peer refused the connection, or speaks another version; both versions are in the message."""


class PeerLostError(FabricError):
    """The peer died or the link broke."""

    retryable = True


class CodecError(IsthmusError):
    """A value that cannot be encoded, or bytes that do not decode."""


class FunctionLoadError(IsthmusError):
    """The function could not be rebuilt on the executor (a missing module, a version conflict)."""


class CallError(IsthmusError):
    """A call ended without the function's own result."""


class CallTimeoutError(CallError, TimeoutError):
    """The call's timeout_s passed before it ended."""


class CallCancelledError(CallError, concurrent.futures.CancelledError):
    """The call was cancelled before it ended."""


class ExecutorLostError(CallError):
    """The process that ran the call died. It may have run in part; retry only if it is idempotent."""


class MemoryLimitError(ExecutorLostError):
    """The call went over the memory of its lease and was killed."""


class RemoteError(CallError):
    """The function raised what cannot be rebuilt here; its type, text and traceback are inside."""


class MapError(IsthmusError):
    """Some calls of a map failed.

    failures   ((index of the item, its exception), ...) in input order
    """

    def __init__(self, message: str, failures: tuple[tuple[int, BaseException], ...] = ()) -> None:
        super().__init__(message)
        self.failures = failures
