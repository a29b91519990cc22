"""Parts of error messages."""

from __future__ import annotations


def first_lines(error: BaseException, count: int = 1) -> str:
    """Return the first lines of an error's message that are not blank, joined by spaces.

    Args:
        error: The error. If it has no message, the name of its type is returned.
        count: Number of lines.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:600] or type(error).__name__
