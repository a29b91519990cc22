"""The exception tree of the SDK; everything it raises on purpose derives from `CrlError`.

Each message says what was expected, what came, and what to do next.
"""

from __future__ import annotations

from typing import Any


class CrlError(Exception):
    """Base of every error the SDK raises on purpose."""


class InvalidInputError(CrlError, ValueError):
    """An argument has a wrong type, shape, dtype or value."""


class CriterionError(InvalidInputError):
    """A criterion's name is malformed."""


class UnknownCriterionError(CriterionError):
    """No basis of that name is loaded; the message lists those that are."""


class ImageError(InvalidInputError):
    """An image cannot be turned into pixels; it fails alone, never its batch.

    Attributes:
        source: what the image was called: a path, or `image 3` for the fourth of a list.
    """

    def __init__(self, message: str, *, source: str = "image") -> None:
        """Prefix `message` with `source`."""
        super().__init__(f"{source}: {message}")
        self.source = source
        self.reason = message


class ImageTooLargeError(ImageError):
    """An image is over a limit of bytes, pixels or aspect ratio."""


class ImageBatchError(ImageError):
    """Some images of a call failed; the others were embedded and are not lost.

    Attributes:
        errors: one `ImageError` per failed image, keyed by its position in the call.
        result: the `Embeddings` of the call, with NaN in the rows of the failed images.
    """

    def __init__(self, errors: dict[int, ImageError], result: Any) -> None:
        """Summarise `errors`; keep `result` for the caller."""
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
    """A model bundle cannot be opened or lacks what was asked of it."""


class IntegrityError(BundleError):
    """A file is not the one its manifest or header describes: changed, truncated or forged."""


class UnsupportedSchemaError(BundleError):
    """An artefact was written in a schema this version of the SDK does not read."""


class BasisError(CrlError):
    """A basis cannot be built, read or written."""


class BasisExistsError(BasisError):
    """There is a basis of that name, which was not to be replaced."""


class GenerationError(BasisError):
    """A language model cannot be loaded, fails, or gives nothing usable."""


class BasisMismatchError(BasisError):
    """A basis was made for another model than the one in use."""


class EngineError(CrlError):
    """A runtime, device or precision is missing, or an inference run failed."""


class PlanError(EngineError):
    """A compiled engine is missing, damaged, stale, or made for another machine."""


class ServiceError(CrlError):
    """A service cannot be reached, or refused a call for a reason of its own."""


class OverloadedError(ServiceError):
    """The service has more to do than it may queue.

    Attributes:
        retry_after: seconds after which another try may succeed.
    """

    def __init__(self, message: str, *, retry_after: float = 0.1) -> None:
        """Store `retry_after` beside the message."""
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ServiceError, TimeoutError):
    """The time given for a call was over before it was done."""


class AccessError(ServiceError):
    """The token is missing, unknown, or without the right that a call needs."""


class NotOfferedError(ServiceError):
    """The server could do this, but its operator has not enabled it."""


class ExportError(CrlError):
    """A checkpoint could not be turned into a bundle."""


class ParityError(ExportError):
    """An exported graph does not agree with its reference within the stated tolerance."""


class MissingDependencyError(CrlError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """Name the missing `package`, the `extra` that brings it and what it is for."""
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'crl-embeddings[{extra}]'"
        )
        self.extra = extra
