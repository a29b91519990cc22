"""Messages of the code suggest commands, options and packages that exist.

The strings of the source are read, not run. Values that are filled in later count as any word.
Commands that errors suggest are run in `tests/cli`.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
from pages import OTHER_PACKAGES, ROOT, cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCES = sorted(chain(*((ROOT / package).rglob("*.py") for package in ("crl_sdk", "export"))))
FILLED = "VALUE"
INSTALL = re.compile(r"pip install ((?:--[\w-]+ )*)'?([\w-]+(?:\[[\w,-]+\])?)'?")
COMMAND = re.compile(r"\bcrl((?: [a-z][a-z-]*)+)([^;`]*)")


class Message(NamedTuple):
    """A string of the source, with VALUE for each filled-in value."""

    where: str
    text: str


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def filled(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(filled(part) for part in node.values)
    return FILLED


@cache
def messages() -> tuple[Message, ...]:
    found = []
    for path, tree in trees().items():
        parts = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in parts:
                text = filled(node)
                if text != FILLED:
                    found.append(Message(f"{path.relative_to(ROOT)}:{node.lineno}", text))
    return tuple(found)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def packages_of(extra: str) -> set[str]:
    """Return the packages that an extra installs, with those of the extras that it names."""
    found = set()
    for requirement in project()["optional-dependencies"][extra]:
        name, inner = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", requirement).groups()
        if name == project()["name"]:
            found.update(*map(packages_of, inner.split(",")))
        else:
            found.add(name)
    return found


def wrong_installs(message: Message) -> list[str]:
    wrong = []
    for _, target in INSTALL.findall(message.text):
        name, _, extras = target.rstrip("]").partition("[")
        if name == project()["name"]:
            unknown = set(extras.split(",")) - set(project()["optional-dependencies"])
            wrong += [f"{message.where}: no extra {extra}" for extra in unknown - {"", FILLED}]
        elif name not in OTHER_PACKAGES and name != FILLED:
            wrong.append(f"{message.where}: pip install {target}")
    return wrong


def wrong_commands(message: Message) -> list[str]:
    """Return commands and options that do not exist. Prose may follow a command."""
    wrong = []
    for words, rest in COMMAND.findall(" ".join(message.text.split())):
        command, path = cli(), ["crl"]
        for word in words.split():
            if not hasattr(command, "commands"):
                break
            if word not in command.commands:
                if path == ["crl"] and word.isalpha():
                    break  # prose, such as "the crl command"
                wrong.append(f"{message.where}: no command {' '.join([*path, word])}")
                break
            path.append(word)
            command = command.commands[word]
        else:
            path = path if not hasattr(command, "commands") else ["crl"]
        if len(path) == 1 or hasattr(command, "commands"):
            continue
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.split(" or |, ", rest)[0]))
        wrong += [f"{message.where}: {' '.join(path)} {option}" for option in used - known]
    return wrong


def test_there_are_messages_with_commands():
    assert sum(len(INSTALL.findall(message.text)) for message in messages()) >= 5
    assert sum(len(COMMAND.findall(message.text)) for message in messages()) >= 60


def test_messages_install_what_exists():
    wrong = list(chain(*map(wrong_installs, messages())))
    assert not wrong


def test_messages_name_commands_that_exist():
    wrong = list(chain(*map(wrong_commands, messages())))
    assert not wrong


@pytest.mark.parametrize(
    "text",
    [
        "pip install 'crl-sdk[cpu]'", "pip install 'crl-embeddings[cpus]'",
        "use crl basis made", "make it again with crl basis create X --overwrites",
    ],
)  # fmt: skip
def test_wrong_messages_are_found(text):
    message = Message("here", text)
    assert wrong_installs(message) or wrong_commands(message)


def test_missing_packages_come_with_the_extra_that_is_named():
    """`MissingDependencyError("scipy", "tasks", …)`: the extra `tasks` installs SciPy."""
    checked, wrong = 0, []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            if getattr(node.func, "id", "") != "MissingDependencyError":
                continue
            package, extra = map(filled, node.args[:2])
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            if extra == FILLED:
                continue
            checked += 1
            if package != FILLED and package not in packages_of(extra) | {"onnxruntime"}:
                wrong.append(f"{where}: {package} is not in the extra {extra}")
    assert checked >= 15 and not wrong, wrong
