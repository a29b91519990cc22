"""How a client calls the service."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ClientSecurity:
    """The token of a client and the TLS files of its connection.

    Attributes:
        token: Token, sent as `authorization: Bearer TOKEN`. Without TLS it travels in plain text.
        authority: PEM file of the authority that signed the server's certificate. None disables
            TLS.
        certificate: PEM file of the client's own certificate, for mutual TLS.
        key: PEM file of the private key of `certificate`.
    """

    token: str = field(default="", repr=False)  # a secret, which logs must not show
    authority: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Timeouts, retries, batching and security of a client.

    Attributes:
        timeout: Seconds for one call, including its retries.
        retries: Number of retries while the server is overloaded or unavailable. Calls that change
            bases are never retried.
        batch_size: Number of images in one call.
        max_in_flight: Number of calls that one list of images may have in progress.
        max_message_bytes: Size limit of one message in either direction.
        resize: Whether to decode and resize images here, as the server would, and to send pixels.
            Large images then need less bandwidth and less work on the server; the embeddings are
            the same bit for bit. Needs Pillow. The server's cache identifies such an image by its
            pixels, not by its file.
        security: Token and TLS files.
    """

    timeout: float = 30.0
    retries: int = 4
    batch_size: int = 16
    max_in_flight: int = 4
    max_message_bytes: int = 64 * 2**20
    resize: bool = False
    security: ClientSecurity = field(default_factory=ClientSecurity)


DEFAULT_OPTIONS = ClientOptions()
