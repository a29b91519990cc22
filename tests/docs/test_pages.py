"""The pages agree with the code: Python blocks, commands, options, links, names of packages.

Nothing is run and nothing is read from a network. A renamed function, option or file fails here, so
that the page is changed with it.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pages import FENCE, FOR_USERS, OTHER_PACKAGES, PAGES, ROOT, blocks, cli, commands, inline, read

from crl_sdk import AsyncClient, Client, Embedder
from crl_sdk.tasks import Index

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OTHER_OPTIONS = {
    "--check", "--only", "--quick", "--readme",  # of crl_benchmarks.peers
    "--gpus", "--runtime", "--system-site-packages",  # of Docker and of venv
}  # fmt: skip
ELLIPSIS = "…"

PYTHON_BLOCKS = [block for page in PAGES for block in blocks(page, "python")]
CRL_COMMANDS = [
    (where, words[1:]) for page in PAGES for where, words in commands(page) if words[0] == "crl"
]


@cache
def all_options() -> frozenset[str]:
    def walk(command: Any) -> set[str]:
        own = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        return own.union(*map(walk, getattr(command, "commands", {}).values()))

    return frozenset(walk(cli()))


def choices(parameter: Any) -> set[str]:
    """Return the values that a parameter of typer accepts; empty if it accepts any."""
    annotation = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    return set(get_args(annotation)) if get_origin(annotation) is Literal else set()


def check_command(words: list[str], *, partial: bool = False) -> str | None:
    """Return what is wrong with the words after `crl`, or None. Nothing is run.

    A partial command need not have all arguments, nor the value of its last option.
    """
    command, path = cli(), ["crl"]
    while hasattr(command, "commands"):
        if not words or words[0] == ELLIPSIS or words[0].startswith("-") or words[0].isupper():
            return None
        if words[0] not in command.commands:
            return f"no command {' '.join([*path, words[0]])!r}"
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    partial = partial or ELLIPSIS in words
    words = [word for word in words if word != ELLIPSIS]
    context = command.context_class(command, info_name=" ".join(path))
    try:
        parser = command.make_parser(context)
        try:
            values, _, _ = parser.parse_args(list(words))
        except Exception:
            if not partial or not words[-1].startswith("-"):
                raise
            values, _, _ = parser.parse_args([*words, "VALUE"])
    except Exception as error:  # typer carries its own copy of click and its exceptions
        return f"{' '.join(path)}: {getattr(error, 'message', None) or error}"
    for parameter in command.params:
        given = values.get(parameter.name)
        missing = given is None or given in ((), [])
        if parameter.required and missing and not partial:
            return f"{' '.join(path)}: {parameter.name} is missing"
        allowed = choices(parameter)
        for value in (
            [] if missing or not allowed else given if isinstance(given, list) else [given]
        ):
            if value not in allowed and not str(value).isupper():  # NAME stands for a value
                return f"{' '.join(path)}: {value!r} is none of {sorted(allowed)}"
    return None


def is_public(module: str, name: str | None = None) -> str | None:
    """Return what is wrong with a name of crl_sdk in a page, or None."""
    if any(part.startswith("_") for part in module.split(".")):
        return f"{module} is private"
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError:
        return f"{module} does not exist"
    if name is None:
        return None
    exported = getattr(loaded, "__all__", [n for n in vars(loaded) if not n.startswith("_")])
    if name not in exported or not hasattr(loaded, name):
        return f"{module} does not export {name}"
    return None


def test_there_are_pages_with_code():
    assert len(PYTHON_BLOCKS) >= 8
    assert len(CRL_COMMANDS) >= 60


def test_the_first_example_of_the_readme_is_short():
    example = blocks(ROOT / "README.md", "python")[0].text
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=str)
def test_python_blocks_compile_and_import_public_names(block):
    tree = ast.parse(block.text, f"{block}")
    for node in ast.walk(tree) if block.page in FOR_USERS else ():
        if isinstance(node, ast.Import):
            wrong = [is_public(n.name) for n in node.names if n.name.split(".")[0] == "crl_sdk"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "crl_sdk":
            wrong = [is_public(str(node.module), n.name) for n in node.names]
        else:
            continue
        assert not any(wrong), f"{block}: {wrong}"


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=str)
def test_python_blocks_call_methods_that_exist(block):
    """Objects go by their names in the pages: `client`, `embedder`, `index`."""
    if "tritonclient" in block.text:
        return
    kinds = {"client": (Client, AsyncClient), "embedder": (Embedder,), "index": (Index,)}
    for name, attribute in re.findall(r"\b(client|embedder|index)\.(\w+)", block.text):
        if re.search(rf"(from|import) \S*{name}\.{attribute}", block.text):
            continue
        assert all(hasattr(kind, attribute) for kind in kinds[name]), f"{name}.{attribute}"


def test_crl_commands_parse():
    wrong = [
        f"{where}: {what}"
        for where, words in CRL_COMMANDS  # those of the prose come without a line number
        if (what := check_command(words, partial=":" not in where))
    ]
    assert not wrong, "\n".join(wrong)


def test_options_in_the_prose_exist():
    wrong = []
    for page in PAGES:
        for span in inline(page):
            option = span.split()[0].split("=")[0]
            known = all_options() | OTHER_OPTIONS
            if option.startswith("--") and option not in known:
                wrong.append(f"{page.name}: {span}")
    assert not wrong, "\n".join(wrong)


def test_environment_variables_are_read():
    source = "".join(path.read_text() for path in (ROOT / "crl_sdk").rglob("*.py"))
    for page in FOR_USERS:
        for name in re.findall(r"\bCRL_[A-Z]+\b", read(page)):
            assert f'"{name}"' in source, f"{page.name}: nothing reads {name}"


def test_names_in_the_prose_are_public():
    wrong = []
    for page in FOR_USERS:
        for span in inline(page):
            found = re.match(r"crl_sdk(?:\.\w+)+", span)
            if found is None or is_public(found[0]) is None:
                continue
            module, *names = re.split(r"\.(?=[A-Z])", found[0], maxsplit=1)  # a class, its method
            if not names:
                module, _, name = found[0].rpartition(".")
                names = [name]
            name, _, attribute = names[0].partition(".")
            if what := is_public(module, name):
                wrong.append(f"{page.name}: {what}")
            elif attribute and not hasattr(
                getattr(importlib.import_module(module), name), attribute
            ):
                wrong.append(f"{page.name}: {found[0]} does not exist")
    assert not wrong, "\n".join(wrong)


def test_pip_installs_this_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wrong = []
    for page in PAGES:
        for where, words in commands(page):
            if words[:2] != ["pip", "install"]:
                continue
            for target in (word for word in words[2:] if not word.startswith("-")):
                found = re.fullmatch(r"([^\[<>=]+)(?:\[([\w,-]+)\])?([<>=].*)?", target)
                assert found, f"{where}: {target}"
                local = found[1].startswith((".", "/", "dist/"))
                ours = local or found[1] == project["name"]
                if not ours and found[1] not in OTHER_PACKAGES:
                    wrong.append(f"{where}: {target}")
                extras = set((found[2] or "").split(",")) - {""}
                if ours and not extras <= set(project["optional-dependencies"]):
                    wrong.append(f"{where}: no such extra in {target}")
    assert not wrong, "\n".join(wrong)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for where, words in commands(page):
            if words[0] == "make" and len(words) > 1:
                assert words[1] in targets, f"{where}: make {words[1]}"


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", read(page))
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = FENCE.sub("", read(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: no heading {anchor!r} in {linked.name}"


def test_files_in_the_prose_exist():
    wrong = []
    for page in PAGES:
        for span in inline(page):
            if re.fullmatch(
                r"(crl_sdk|crl_export|export|benchmarks|tests|proto|docs)/[\w./-]+", span
            ):
                path = re.sub(r"^crl_export/", "export/", span)
                if not (ROOT / path).exists():
                    wrong.append(f"{page.name}: {span}")
    assert not wrong, "\n".join(wrong)
