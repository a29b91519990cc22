"""System shared memory of KServe clients: named regions, read and written without mapping them.

A client can shorten a shared memory object at any time. A process that touches a mapped page beyond
the new end is killed (SIGBUS). Reading and writing through the file descriptor copies the bytes
once, and a shortened object is an error of the one call.
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
    """A part of an open POSIX shared memory object.

    Attributes:
        key: Name of the object, as shm_open takes it.
        offset: Start of the region in the object, in bytes.
        byte_size: Size of the region, in bytes.
        descriptor: File descriptor of the object.
    """

    key: str
    offset: int
    byte_size: int
    descriptor: int


class SharedMemory:
    """The regions that clients have registered. Only the event loop's thread may use it."""

    def __init__(self, enabled: bool) -> None:
        """Store whether clients may register regions.

        A client that may do so can name every shared memory object of this user.
        """
        self.enabled = enabled
        self.regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open a region and register it under a name.

        Args:
            name: Name of the region in later requests.
            key: Name of the shared memory object, such as `/frames`.
            offset: Start of the region in the object, in bytes.
            byte_size: Size of the region, in bytes.

        Raises:
            NotOfferedError: If the operator has not enabled shared memory.
            InvalidInputError: If the name is taken, the key is malformed, or the object does not
                exist or is too small.
        """
        if not self.enabled:
            raise NotOfferedError(
                "this server does not use shared memory; send the tensors in the message, or ask "
                "its operator to start it with --shared-memory"
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
                f"{len(self.regions) + 1}; unregister those that are no longer used"
            )
        if not _KEY.fullmatch(key):
            raise InvalidInputError(
                f"expected the key of a shared memory object such as '/frames', got {key[:80]!r}"
            )
        self.regions[name] = _open(key, offset, byte_size)

    def unregister(self, name: str) -> None:
        """Unregister a region, or all regions if `name` is empty. Unknown names are ignored."""
        for known in [name] if name else list(self.regions):
            region = self.regions.pop(known, None)
            if region is not None:
                os.close(region.descriptor)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return a copy of `size` bytes that start at `offset` in a region.

        Raises:
            InvalidInputError: If the region does not exist or does not contain these bytes.
        """
        region = self._within(name, offset, size)
        data = os.pread(region.descriptor, size, region.offset + offset)
        if len(data) != size:
            raise InvalidInputError(
                f"the shared memory object {region.key!r} was shortened: {len(data)} of {size} "
                "bytes could be read; register it again"
            )
        return data

    def write(self, name: str, offset: int, room: int, data: bytes) -> None:
        """Copy bytes into a region.

        Args:
            name: Name of the region.
            offset: Start of the output in the region, in bytes.
            room: Number of bytes that the client has reserved for the output.
            data: Bytes to write.

        Raises:
            InvalidInputError: If the region does not exist or has no room for the data.
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
                f"the shared memory object {region.key!r} was shortened; register it again"
            )
        os.pwrite(region.descriptor, data, at)

    def _within(self, name: str, offset: int, size: int) -> Region:
        region = self.regions.get(name)
        if region is None:
            raise InvalidInputError(
                f"no shared memory region {name!r}, known are {sorted(self.regions)}: register it "
                "first"
            )
        if offset < 0 or size < 0 or offset + size > region.byte_size:
            raise InvalidInputError(
                f"expected a range within the {region.byte_size} bytes of the region {name!r}, "
                f"got {size} bytes from offset {offset}"
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
