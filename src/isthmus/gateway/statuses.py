"""One table from the error tree to HTTP statuses. A test walks all subclasses, so that none is missing."""

from isthmus.core import errors
from isthmus.core.api import ErrorBody

STATUSES: dict[type[errors.IsthmusError], int] = {
    errors.IsthmusError: 500,
    errors.SettingsError: 500,
    errors.PolicyError: 422,
    errors.AuthError: 401,
    errors.TokenError: 401,
    errors.PermissionDeniedError: 403,
    errors.NotFoundError: 404,
    errors.InvalidRequestError: 400,
    errors.DeniedError: 403,
    errors.NoCapacityError: 503,
    errors.SiteUnavailableError: 503,
    errors.LeaseEndedError: 410,
    errors.EvictedError: 410,
    errors.FabricError: 502,
    errors.FrameError: 502,
    errors.HandshakeError: 502,
    errors.PeerLostError: 502,
    errors.CodecError: 422,
    errors.FunctionLoadError: 422,
    errors.CallError: 500,
    errors.CallTimeoutError: 504,
    errors.CallCancelledError: 409,
    errors.ExecutorLostError: 502,
    errors.MemoryLimitError: 507,
    errors.RemoteError: 500,
    errors.MapError: 500,
}


def status_of(error: errors.IsthmusError) -> int:
    """The status of the error's class, else of its nearest ancestor in the table."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def body_of(error: errors.IsthmusError) -> ErrorBody:
    """The code is a class that clients know: of an error from elsewhere, its nearest ancestor in the tree."""
    code = next(kind.__name__ for kind in type(error).__mro__ if kind in STATUSES)
    return ErrorBody(code=code, message=str(error), retryable=error.retryable)
