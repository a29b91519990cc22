"""The configuration file of `crl serve`: its options in TOML."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import typer

from crl_sdk.errors import InvalidInputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a file as defaults of the command. A callback of `--config`.

    Options on the command line and environment variables come before them.

    Args:
        context: Context of the command.
        path: TOML file with the long names of options as keys, such as `max-batch = 64`. None for
            no file.

    Raises:
        InvalidInputError: If the file cannot be read, or a key or the type of a value is wrong.
    """
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInputError(f"{path}: not a TOML file ({error})") from error
    options = {
        name.removeprefix("--"): str(parameter.name)
        for parameter in context.command.params
        for name in parameter.opts
        if name.startswith("--") and name not in ("--config", "--help")
    }
    defaults = {}
    for key, value in values.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"; do you mean {near[0]!r}?" if near else ""
            raise InvalidInputError(f"{path}: crl serve has no option {key!r}{hint}")
        if not isinstance(value, str | int | float):  # the option itself checks the rest
            raise InvalidInputError(
                f"{path}: {key}: expected a string, a number, true or false, got {value!r}"
            )
        defaults[options[key]] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path
