"""The configuration file of `crl serve`: its options in TOML."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
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

    Returns:
        The path.

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
        name.removeprefix("--"): parameter
        for parameter in context.command.params
        for name in parameter.opts
        if name.startswith("--") and name not in ("--config", "--help")
    }
    types = get_type_hints(context.command.callback)
    defaults = {}
    for key, value in values.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"; do you mean {near[0]!r}?" if near else ", see crl serve --help"
            raise InvalidInputError(f"{path}: crl serve has no option {key!r}{hint}")
        option = options[key]
        name = str(option.name)
        try:
            if getattr(option, "multiple", False) and isinstance(value, str):
                value = [value]  # noqa: PLW2901 - one of several may stand alone
            msgspec.convert(value, _toml_type(types[name]))
            option.process_value(context, value)
        except msgspec.ValidationError as error:
            message = str(error).replace("Expected", "expected")
            raise InvalidInputError(f"{path}: {key} is {value!r}: {message}") from error
        except typer.BadParameter as error:
            raise InvalidInputError(f"{path}: {key} is {value!r}: {error.message}") from error
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _toml_type(annotation: Any) -> Any:
    """Return the type of an option's value in TOML, which has no paths and no None."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    if get_origin(kinds[0]) is list:
        return list[str]
    return kinds[0] if kinds[0] in (bool, int, float) else str
