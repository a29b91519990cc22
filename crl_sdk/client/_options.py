"""How a client calls the service."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from crl_sdk.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class ClientSecurity:
    """The token of a client and the TLS files of its connection.

    Attributes:
        token: Token, sent as `authorization: Bearer TOKEN`. Without TLS it is sent to this machine
            only, unless `plain_text_token` is true.
        authority: PEM file of the authority that signed the server's certificate, or `system` for
            the authorities that this machine trusts. None disables TLS.
        certificate: PEM file of the client's own certificate, for mutual TLS.
        key: PEM file of the private key of `certificate`.
        plain_text_token: Whether the token may travel to another machine without TLS, where
            everyone on the way can read it.
    """

    token: str = field(default="", repr=False)  # a secret, which logs must not show
    authority: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    plain_text_token: bool = False

    def __post_init__(self) -> None:
        """Check that gRPC can send the token, and that certificate and key are complete.

        Raises:
            InvalidInputError: If the token has characters that are not printable ASCII, one of
                `certificate` and `key` is missing, or both are given without an authority.
        """
        if not (self.token.isascii() and self.token.isprintable()):
            raise InvalidInputError(
                "expected a token of printable ASCII characters: remove the others, such as a line "
                "end after it"
            )
        if (self.certificate is None) != (self.key is None):
            raise InvalidInputError(
                "expected ClientSecurity.certificate and ClientSecurity.key together: give both, "
                "or neither"
            )
        if self.certificate is not None and self.authority is None:
            raise InvalidInputError(
                "a client certificate needs TLS: set ClientSecurity.authority to the PEM file of "
                "the authority that signed the server's certificate, or to 'system'"
            )


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Timeouts, retries, batching and security of a client.

    Attributes:
        timeout: Seconds for one call, including its retries.
        retries: Number of retries while the server is overloaded or unavailable. A server that has
            answered this client before is waited for until the timeout, unless `retries` is 0.
            Calls that change bases are never retried.
        batch_size: Number of images in one call.
        max_in_flight: Number of calls that one list of images may have in progress.
        max_message_bytes: Size limit of one message in either direction.
        resize: Whether to decode and resize images here, as the server would, and to send pixels.
            Large images then need less bandwidth and less work on the server; the embeddings are
            the same bit for bit. Needs Pillow. The server's cache identifies such an image by its
            pixels, not by its file.
        security: Token and TLS files.
        model: Name of the model that all calls are for, if the server has several. Empty for its
            default one. `Client.model` says which there are.
    """

    timeout: float = 30.0
    retries: int = 4
    batch_size: int = 16
    max_in_flight: int = 4
    max_message_bytes: int = 64 * 2**20
    resize: bool = False
    security: ClientSecurity = field(default_factory=ClientSecurity)
    model: str = ""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InvalidInputError: If one of them is too small.
        """
        if not self.timeout > 0:
            raise InvalidInputError(f"expected timeout > 0 seconds, got {self.timeout}")
        for name, least in (
            ("retries", 0), ("batch_size", 1), ("max_in_flight", 1), ("max_message_bytes", 1)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise InvalidInputError(f"expected {name} >= {least}, got {getattr(self, name)}")


DEFAULT_OPTIONS = ClientOptions()
