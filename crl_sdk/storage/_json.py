"""Decode JSON from files that anybody may have written."""

from __future__ import annotations

from typing import Any

import msgspec


def decode_json(data: bytes | str) -> Any:
    """Return the value of a JSON document.

    Raises:
        msgspec.DecodeError: If it is not JSON, not UTF-8, or nested too deeply.

    Example:
        >>> decode_json(b'{"schema": 1}')
        {'schema': 1}
    """
    try:
        return msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise msgspec.DecodeError("nested too deeply") from error
