"""A bound on the memory of all images that are being decoded at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

_BYTES = {"1": 1, "L": 1, "P": 1}
"""Bytes of a pixel in Pillow's memory. Modes that begin with I;16 take 2, all others 4."""

_WHOLE_BUFFER = ("WEBP", "AVIF", "GIF", "JPEG2000")
"""Formats whose decoders hold a whole image of four bytes per pixel of their own."""

_PROGRESSIVE = 6
"""Bytes of coefficients per pixel that libjpeg holds of a progressive JPEG, without subsampling."""


class DecodeBudget:
    """Lets threads decode images while the memory that they need stays within a limit.

    Images take their turns in the order in which they ask, so that a large one is not kept waiting
    by small ones for ever. An image that needs more than the limit must be refused before.

    Attributes:
        limit: Largest number of bytes at once.
        used: Number of bytes that are reserved now.
    """

    def __init__(self, limit: int) -> None:
        """Begin with nothing reserved.

        Args:
            limit: Largest number of bytes at once.
        """
        self.limit, self.used = limit, 0
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def reserve(self, nbytes: int) -> Iterator[None]:
        """Wait until some bytes are free, and keep them for the block.

        Args:
            nbytes: Number of bytes. More than `limit` waits until nothing else is reserved.
        """
        nbytes = min(nbytes, self.limit)
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._waiting[0] is ticket and self.used + nbytes <= self.limit
                )
                self.used += nbytes
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.used -= nbytes
                self._changed.notify_all()


def estimate_decode_bytes(image: Image.Image, *, turned: bool, plain: bool) -> int:
    """Return about how many bytes it takes to decode an opened image and to convert it.

    Args:
        image: Image whose header was read.
        turned: Whether its orientation is changed, for which it is copied.
        plain: Whether it is of the mode L or RGB and opaque, so that it is not converted.
    """
    pixels = image.width * image.height
    source = 2 if image.mode.startswith("I;16") else _BYTES.get(image.mode, 4)
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    converted = 0 if plain else 1 if grey else 4
    decoder = 4 if image.format in _WHOLE_BUFFER else 0
    if image.info.get("progressive"):
        decoder = _PROGRESSIVE
    return pixels * (source + max(decoder, source if turned else 0, converted))
