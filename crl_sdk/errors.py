"""Errors of the SDK. All of them derive from `CrlError`.

Each message says what was expected, what came instead, and what to do next.
"""

from __future__ import annotations

from typing import Any


class CrlError(Exception):
    """Base class of the errors that the SDK raises."""


class InvalidInputError(CrlError, ValueError):
    """An argument has the wrong type, shape, dtype or value."""


class ClosedError(CrlError, RuntimeError):
    """An object was used after it had been closed."""


class ForkError(CrlError, RuntimeError):
    """An object was used in a process that was forked after the object had been made."""


class CriterionError(InvalidInputError):
    """The name of a criterion is malformed, or the criterion is not part of a result."""


class UnknownCriterionError(CriterionError):
    """There is no basis of a criterion. The message lists the bases that there are."""


class UnknownModelError(InvalidInputError):
    """A server has no model of a name. The message lists those that it has."""


class ImageError(InvalidInputError):
    """An image cannot be read. The other images of its batch are not affected.

    Attributes:
        source: Name of the image: its path, or `image 3` for the fourth of a list.
        reason: What is wrong with the image.
    """

    def __init__(self, message: str, *, source: str = "image") -> None:
        """Store the reason `message`, and put `source` before it in the text of the error."""
        super().__init__(f"{source}: {message}")
        self.source = source
        self.reason = message


class ImageTooLargeError(ImageError):
    """An image exceeds a limit of bytes, pixels or aspect ratio."""


class ImageBatchError(ImageError):
    """Some images of a call failed. The others were embedded, see `result`.

    Attributes:
        errors: Errors of the failed images, by position in the call.
        result: Embeddings of the call. The rows of failed images are NaN.
    """

    def __init__(self, errors: dict[int, ImageError], result: Any) -> None:
        """Store the errors and the result, and summarise the errors in the message."""
        shown = "; ".join(str(error) for error in list(errors.values())[:3])
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        super().__init__(
            f"{len(errors)} could not be read ({shown}{more}). The others are in this "
            'exception\'s `.result`; pass on_error="collect" to get them without an exception',
            source="images",
        )
        self.errors = errors
        self.result = result


class BundleError(CrlError):
    """A bundle cannot be opened, or lacks a part that is needed."""


class IntegrityError(BundleError):
    """A file does not match its manifest or header: it was changed, truncated or forged."""


class UnsupportedSchemaError(BundleError):
    """A file has a schema that this version of the SDK does not read."""


class BasisError(CrlError):
    """A basis cannot be made, read or written."""


class BasisExistsError(BasisError):
    """A criterion already has a basis, and the call must not replace it."""


class BasisStoreError(BasisError):
    """A server's directory of bases cannot be written to."""


class GenerationError(BasisError):
    """A language model cannot be loaded, fails, or gives no usable texts."""


class BasisMismatchError(BasisError):
    """A basis was made for another model than the one in use."""


class EngineError(CrlError):
    """An engine is not available on this machine, or an inference run failed."""


class PlanError(EngineError):
    """A TensorRT plan is missing, damaged, out of date, or made for another machine."""


class ServiceError(CrlError):
    """A service cannot be reached, or a call to it failed."""


class OverloadedError(ServiceError):
    """The queue of the service is full.

    Attributes:
        retry_after: Seconds after which a retry may succeed.
    """

    def __init__(self, message: str, *, retry_after: float = 0.1) -> None:
        """Store the message and `retry_after`."""
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ServiceError, TimeoutError):
    """A call took longer than its timeout."""


class AccessError(ServiceError):
    """The token is missing or unknown, or lacks the right that the call needs."""


class NotOfferedError(ServiceError):
    """The operator of the server has not enabled this call."""


class VectorStoreError(CrlError):
    """A vector store cannot be reached, read or written to."""


class StoreMismatchError(VectorStoreError):
    """A collection holds another model, another version of a basis, or other vectors."""


class ExportError(CrlError):
    """A checkpoint cannot be exported to a bundle."""


class ParityError(ExportError):
    """The outputs of an exported graph differ from the reference by more than the tolerance."""


class MissingDependencyError(CrlError, ImportError):
    """An optional package is not installed. The message contains the command that installs it.

    Attributes:
        extra: Extra of `crl-embeddings` that brings the package.
    """

    def __init__(self, package: str, extra: str, purpose: str, *, otherwise: str = "") -> None:
        """Store the extra.

        Args:
            package: Name of the missing package.
            extra: Extra that brings it.
            purpose: What needs the package.
            otherwise: What else to know or do, added after the command.
        """
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'crl-embeddings[{extra}]'"
            + (f", {otherwise}" if otherwise else "")
        )
        self.extra = extra
