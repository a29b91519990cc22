"""Typed errors ↔ gRPC statuses: one table, read from left to right by servers, back by clients."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from crl_sdk import errors

ERROR_KEY = "crl-error"
"""Trailer with the name of the exception, so that a client can raise the same one."""

RETRY_KEY = "retry-after-ms"

_CODES: dict[type[errors.CrlError], grpc.StatusCode] = {
    # the first that fits is taken, so the special ones come first
    errors.UnknownCriterionError: grpc.StatusCode.NOT_FOUND,
    errors.BasisMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.GenerationError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.BasisExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.AccessError: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotOfferedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.EngineError: grpc.StatusCode.UNAVAILABLE,
    errors.IntegrityError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedSchemaError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MissingDependencyError: grpc.StatusCode.UNIMPLEMENTED,
    errors.CrlError: grpc.StatusCode.INTERNAL,
}
_FALLBACKS: dict[grpc.StatusCode, type[errors.CrlError]] = {
    grpc.StatusCode.NOT_FOUND: errors.UnknownCriterionError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInputError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AccessError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessError,
}
_BY_NAME: dict[str, type[errors.CrlError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type)
    and issubclass(kind, errors.CrlError)
    and kind not in (errors.ImageBatchError, errors.MissingDependencyError)  # more than a message
}


def status_code(error: errors.CrlError) -> grpc.StatusCode:
    """Give the status of an error."""
    return next(code for kind, code in _CODES.items() if isinstance(error, kind))


def error_trailers(error: errors.CrlError) -> tuple[tuple[str, str], ...]:
    """Give the trailers that go with an error: its kind, and when to try again."""
    trailers = ((ERROR_KEY, type(error).__name__),)
    if isinstance(error, errors.OverloadedError):
        return (*trailers, (RETRY_KEY, str(round(error.retry_after * 1000))))
    return trailers


def error_from_status(
    code: grpc.StatusCode, message: str, metadata: Iterable[tuple[str, str | bytes]] | None
) -> errors.CrlError:
    """Give the error that a status stands for.

    Args:
        code: of the status.
        message: of the status.
        metadata: the call's trailers, if any.

    Returns:
        The server's own kind of error where it told, else the one the code suggests.
    """
    trailers = {key: value for key, value in metadata or () if isinstance(value, str)}
    kind = _BY_NAME.get(trailers.get(ERROR_KEY, "")) or _FALLBACKS.get(code, errors.ServiceError)
    if issubclass(kind, errors.OverloadedError):
        return kind(message, retry_after=int(trailers.get(RETRY_KEY, "100")) / 1000)
    if kind is errors.ServiceError or kind is errors.CrlError:
        return errors.ServiceError(f"{code.name}: {message}")
    return kind(message)
