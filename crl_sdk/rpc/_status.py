"""Turn the SDK's errors into gRPC statuses (in the server) and back into errors (in the client)."""

from __future__ import annotations

import re
from collections.abc import Iterable

import grpc

from crl_sdk import errors

ERROR_KEY = "crl-error"
"""Trailer with the class name of the error, so that a client can raise the same class."""

RETRY_KEY = "retry-after-ms"
"""Trailer with the milliseconds after which an overloaded server should be called again."""

_DEFAULT_RETRY_MS = 100
_TOO_LARGE = "message larger than max"
_MILLISECONDS = re.compile(r"[0-9]{1,9}")

_CODES: dict[type[errors.CrlError], grpc.StatusCode] = {
    errors.CrlError: grpc.StatusCode.INTERNAL,
    errors.ClosedError: grpc.StatusCode.UNAVAILABLE,
    errors.ForkError: grpc.StatusCode.UNAVAILABLE,
    errors.InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownCriterionError: grpc.StatusCode.NOT_FOUND,
    errors.UnknownModelError: grpc.StatusCode.NOT_FOUND,
    errors.BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.IntegrityError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedSchemaError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.BasisError: grpc.StatusCode.INTERNAL,
    errors.BasisExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.BasisStoreError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.BasisMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.GenerationError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EngineError: grpc.StatusCode.UNAVAILABLE,
    errors.ServiceError: grpc.StatusCode.INTERNAL,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.AccessError: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotOfferedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.ExportError: grpc.StatusCode.INTERNAL,
    errors.MissingDependencyError: grpc.StatusCode.UNIMPLEMENTED,
}
"""Status of each class of errors. A class that is not listed has the status of its parent."""

_FALLBACKS: dict[grpc.StatusCode, type[errors.CrlError]] = {
    grpc.StatusCode.NOT_FOUND: errors.UnknownCriterionError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInputError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AccessError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessError,
}
"""Class of the error for a status without the trailer `ERROR_KEY`, such as one from a proxy."""

_REMEDIES = (
    ("WRONG_VERSION_NUMBER",
     "the server speaks plain text, and this client TLS: leave ClientSecurity.authority out, or "
     "start crl serve with --tls-cert and --tls-key"),
    ("certificate has expired",
     "the server's certificate has expired: its operator must renew it"),
    ("CERTIFICATE_VERIFY_FAILED",
     "the server's certificate was not signed by ClientSecurity.authority: name the PEM file of "
     "the authority that did"),
    ("Hostname Verification",
     "the server's certificate is for another host name: use the name in the certificate"),
    ("failed to connect.*Socket closed",
     "if `crl serve` runs there, it speaks TLS and this client plain text: set "
     "ClientSecurity.authority (crl bench --authority) to the PEM file of its authority or to "
     "'system'. Or it asks for a client certificate that its --tls-client-ca signed: set "
     "ClientSecurity.certificate and key"),
    ("Socket closed|reset by peer",
     "the connection ended during the call: check that `crl serve` still runs there"),
    ("", "check the address, that `crl serve` runs there, and whether it speaks TLS: only then set "
     "ClientSecurity.authority"),
)  # fmt: skip
"""What to do about a failed connection, by a pattern in gRPC's message; the first that fits."""

_BY_NAME: dict[str, type[errors.CrlError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type)
    and issubclass(kind, errors.CrlError)
    # these two cannot be made from a message alone
    and kind not in (errors.ImageBatchError, errors.MissingDependencyError)
}


def status_code(error: errors.CrlError) -> grpc.StatusCode:
    """Return the gRPC status of an error."""
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def error_trailers(error: errors.CrlError) -> tuple[tuple[str, str], ...]:
    """Return the trailers to send with an error: its class, and when to try again."""
    trailers = ((ERROR_KEY, type(error).__name__),)
    if isinstance(error, errors.OverloadedError):
        return (*trailers, (RETRY_KEY, str(round(error.retry_after * 1000))))
    return trailers


def error_from_status(
    code: grpc.StatusCode, message: str, metadata: Iterable[tuple[str, str | bytes]] | None
) -> errors.CrlError:
    """Return the error of a failed call.

    Args:
        code: Status of the call.
        message: Message of the status.
        metadata: Trailers of the call, if any.

    Returns:
        An error of the class that the server named in its trailers. Without a name, the class
        depends on the status.
    """
    trailers = {key: value for key, value in metadata or () if isinstance(value, str)}
    if ERROR_KEY not in trailers and _TOO_LARGE in message:  # gRPC's own error, here or there
        return errors.InvalidInputError(
            f"{message}: send fewer or smaller images in one call, or raise max_message_bytes "
            "where the limit is"
        )
    kind = _BY_NAME.get(trailers.get(ERROR_KEY, "")) or _FALLBACKS.get(code, errors.ServiceError)
    if issubclass(kind, errors.OverloadedError):
        sent = trailers.get(RETRY_KEY, "")
        milliseconds = int(sent) if _MILLISECONDS.fullmatch(sent) else _DEFAULT_RETRY_MS
        return kind(message, retry_after=milliseconds / 1000)
    if kind is errors.ServiceError or kind is errors.CrlError:
        remedy = ""
        if code is grpc.StatusCode.UNAVAILABLE and ERROR_KEY not in trailers:  # gRPC's own error
            remedy = f"; {next(advice for words, advice in _REMEDIES if re.search(words, message))}"
        return errors.ServiceError(f"{code.name}: {message}{remedy}")
    return kind(message)
