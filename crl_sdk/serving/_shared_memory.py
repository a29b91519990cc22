"""System shared memory of KServe clients: regions by name, read and written without mapping them.

A mapped region kills the process that touches it once its owner has cut it short (SIGBUS). Read and
written through the descriptor, bytes are copied once, and a short region is an error of the call.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass

from crl_sdk.errors import InvalidInputError, NotOfferedError

MAX_REGIONS = 256
_DIRECTORY = "/dev/shm"
_KEY = re.compile(r"/?[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a POSIX shared memory object, opened.

    Attributes:
        key: name of the object, as shm_open takes it.
        offset: where the region starts in it, in bytes.
        byte_size: of the region.
        descriptor: of the open object.
    """

    key: str
    offset: int
    byte_size: int
    descriptor: int


class SharedMemory:
    """The regions that clients have registered. For one thread: the event loop's."""

    def __init__(self, enabled: bool) -> None:
        """Store whether clients may register any: whoever may can name any object of this user."""
        self.enabled = enabled
        self.regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open an object under a name.

        Raises:
            NotOfferedError: the operator has not enabled shared memory.
            InvalidInputError: the name is taken, the key is malformed, there is no such object, or
                it is too small.
        """
        if not self.enabled:
            raise NotOfferedError(
                "this server takes no shared memory; send the tensors in the message, or ask the "
                "operator to start it with --shared-memory"
            )
        known = self.regions.get(name)
        if known is not None:
            if (known.key, known.offset, known.byte_size) == (key, offset, byte_size):
                return
            raise InvalidInputError(
                f"the region {name!r} is registered for {known.key!r} already; unregister it first"
            )
        if not name or len(self.regions) >= MAX_REGIONS:
            raise InvalidInputError(
                f"expected a name and at most {MAX_REGIONS} regions, got {name!r} as number "
                f"{len(self.regions) + 1}; unregister those that are done with"
            )
        if not _KEY.fullmatch(key):
            raise InvalidInputError(
                f"expected the key of a shared memory object such as '/frames', got {key[:80]!r}"
            )
        self.regions[name] = _open(key, offset, byte_size)

    def unregister(self, name: str) -> None:
        """Forget a region, or all of them for an empty name; unknown names are no error."""
        for known in [name] if name else list(self.regions):
            region = self.regions.pop(known, None)
            if region is not None:
                os.close(region.descriptor)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Copy bytes out of a region.

        Raises:
            InvalidInputError: no such region, or the bytes are not within it.
        """
        region = self._within(name, offset, size)
        data = os.pread(region.descriptor, size, region.offset + offset)
        if len(data) != size:
            raise InvalidInputError(
                f"the shared memory object {region.key!r} was cut short: {len(data)} of {size} "
                "bytes could be read; register it again"
            )
        return data

    def write(self, name: str, offset: int, room: int, data: bytes) -> None:
        """Copy bytes into a region.

        Args:
            name: of the region.
            offset: within it.
            room: bytes that the client has set aside there.
            data: what to write.

        Raises:
            InvalidInputError: no such region, the place is not within it, or it is too small.
        """
        region = self._within(name, offset, room)
        if len(data) > room:
            raise InvalidInputError(
                f"the output has {len(data)} bytes, the region {name!r} has room for {room}; "
                "register a larger one"
            )
        at = region.offset + offset
        if os.fstat(region.descriptor).st_size < at + len(data):
            raise InvalidInputError(
                f"the shared memory object {region.key!r} was cut short; register it again"
            )
        os.pwrite(region.descriptor, data, at)

    def _within(self, name: str, offset: int, size: int) -> Region:
        region = self.regions.get(name)
        if region is None:
            raise InvalidInputError(
                f"no shared memory region {name!r}; registered are {sorted(self.regions)}"
            )
        if offset < 0 or size < 0 or offset + size > region.byte_size:
            raise InvalidInputError(
                f"expected bytes within the {region.byte_size} of the region {name!r}, got "
                f"{size} from {offset}"
            )
        return region


def _open(key: str, offset: int, byte_size: int) -> Region:
    path = f"{_DIRECTORY}/{key.removeprefix('/')}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInputError(
            f"the shared memory object {key!r} cannot be opened ({error.strerror})"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size < offset + byte_size or not byte_size:
        os.close(descriptor)
        raise InvalidInputError(
            f"expected a shared memory object of at least {offset + byte_size} bytes, {key!r} has "
            f"{status.st_size}"
        )
    return Region(key, offset, byte_size, descriptor)
