"""Run the shell blocks and Python blocks of the pages as they stand: make docs-test.

Each page runs from top to bottom in a directory of its own. The directory holds what the pages
take for granted: the reader's photographs (`photos/`, `few/`, `a.jpg`, `b.jpg`, `c.jpg`,
`query.jpg`), an exported model (`clip-b32`), lists of texts, and files for TLS. Photographs and
model are those of the demo.

- A block without a language is shell. `crl serve` runs in the background until the page ends or
  starts another server.
- A block `python` continues the Python blocks before it. If a line is an expression with a literal
  in a comment behind it, such as `found.choice.k  # 10`, the two must be equal.
- Other blocks (`text`, `toml`, …) are not run.
- The line above a block may be a comment. `<!-- not run: REASON -->` leaves the block out.
  `<!-- first: COMMANDS -->` runs commands before it, for what a reader of the prose has: a running
  server, or files of their own.

The port 50051 of the pages becomes a free one, and the address 0.0.0.0 becomes 127.0.0.1.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from pages import ROOT, Block, blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMENT = re.compile(r"<!-- (not run|first): (.+) -->")
TEXTS = {
    "color": "red green blue yellow orange purple pink brown black white",
    "colour": "red green blue yellow orange purple pink brown black white",
    "shape": "circle square triangle star heart cross arrow crescent oval rectangle",
    "style": "striped dotted checkered plain",
}


def comments(block: Block) -> dict[str, str]:
    """Return the comments `not run` and `first` of a block."""
    before = block.page.read_text(encoding="utf-8").splitlines()[: block.line - 1]
    found = COMMENT.fullmatch(before[-1].strip()) if before else None
    return {found[1]: found[2]} if found else {}


def prepare(directory: Path) -> None:
    """Write the files that the pages take for granted."""
    import trustme

    from crl_sdk import demo_bundle

    subprocess.run(["crl", "demo-data", "made", "-n", "60"], cwd=directory, check=True)
    made = directory / "made"
    pictures = sorted((made / "images").iterdir())
    for path, name in zip(pictures, ("a", "b", "c", "query"), strict=False):
        shutil.copy(path, directory / f"{name}.jpg")
    rows = [line.split(",") for line in (made / "labels.csv").read_text().splitlines()]
    column = rows[0].index("colour")
    for row in rows[1:41]:
        (directory / "few" / row[column]).mkdir(parents=True, exist_ok=True)
        shutil.copy(made / row[0], directory / "few" / row[column])
    shutil.move(made / "images", directory / "photos")
    shutil.rmtree(made)
    shutil.copytree(demo_bundle(), directory / "clip-b32")
    for name, words in TEXTS.items():
        (directory / f"{name}s.txt").write_text("\n".join(words.split()) + "\n")
    authority = trustme.CA()
    server = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    server.private_key_pem.write_to_path(str(directory / "server.key"))
    for part in server.cert_chain_pems:
        part.write_to_path(str(directory / "server.pem"), append=True)
    tokens = [b for b in blocks(ROOT / "docs/SERVICE.md", "toml") if "token =" in b.text]
    (directory / "tokens.toml").write_text(tokens[0].text)


class Page:
    """A page that runs in the working directory."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block) -> None:
        if block.language == "python":
            self.python(block)
        else:
            self.shell_with_servers(block.text)

    def python(self, block: Block) -> None:
        lines = block.text.splitlines()
        for statement in ast.parse(block.text).body:
            if isinstance(statement, ast.Expr):
                value = eval(
                    compile(ast.Expression(statement.value), str(block), "eval"), self.names
                )
                comment = lines[statement.end_lineno - 1][statement.end_col_offset :].strip(" #")
                try:
                    expected = ast.literal_eval(comment)
                except (SyntaxError, ValueError):  # words
                    continue
                assert value == expected, f"{lines[statement.end_lineno - 1]}: got {value!r}"
            else:
                exec(compile(ast.Module([statement], []), str(block), "exec"), self.names)

    def shell_with_servers(self, text: str) -> None:
        script: list[str] = []
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("crl serve"):
                self.shell(script)
                script = []
                self.serve(line)
            else:
                script.append(line)
        self.shell(script)

    def shell(self, lines: list[str]) -> None:
        if any(line.strip() for line in lines):
            subprocess.run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], check=True)

    def serve(self, line: str) -> None:
        self.stop()
        self.server = subprocess.Popen(
            ["bash", "-c", "exec " + line], stdout=subprocess.PIPE, text=True
        )
        assert self.server.stdout is not None
        said = self.server.stdout.readline()
        assert said and json.loads(said)["event"] == "serving", f"{line} did not serve"

    def stop(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait(60)
            self.server = None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def run_page(path: Path) -> int:
    """Run a page in the working directory. Return the number of blocks that failed."""
    page, failed, port = Page(), 0, str(free_port())
    os.environ["CRL_SERVE_ADDRESS"] = f"127.0.0.1:{port}"
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    try:
        for block in blocks(path, "", "python"):
            where = f"{shown}:{block.line}"
            comment = comments(block)
            text = block.text.replace("Client()", 'Client("127.0.0.1:50051")')
            text = text.replace("0.0.0.0", "127.0.0.1").replace("50051", port)
            if "not run" in comment:
                print(f"=== {where}: not run: {comment['not run']}", flush=True)
                continue
            print(f"=== {where}", flush=True)
            start = time.monotonic()
            try:
                page.shell_with_servers(comment.get("first", ""))
                page.run(block._replace(text=text))
            except Exception:
                traceback.print_exc()
                failed += 1
                print(f"=== {where}: FAILED", flush=True)
            else:
                print(f"=== {where}: passed, {time.monotonic() - start:.1f} s", flush=True)
    finally:
        page.stop()
    return failed


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--in-here"]:
        return run_page(Path(arguments[1]))
    parser = argparse.ArgumentParser(description="Run the blocks of the pages.")
    parser.add_argument("pages", nargs="*", help="such as README.md; all if there is none")
    parser.add_argument("--without", action="append", default=[], help="a page to leave out")
    options = parser.parse_args(arguments)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["COLUMNS"] = "80"
    if unknown := {*options.pages, *options.without} - {page.name for page in PAGES}:
        print(f"expected names of pages such as README.md, got {', '.join(sorted(unknown))}")
        return 2
    pages = [
        page
        for page in PAGES
        if page.name not in options.without and (not options.pages or page.name in options.pages)
    ]
    failed = []
    with tempfile.TemporaryDirectory() as root:
        prepared = Path(root) / "prepared"
        prepared.mkdir()
        prepare(prepared)
        for page in pages:
            if not blocks(page, "", "python"):
                continue
            directory = Path(root) / page.stem
            shutil.copytree(prepared, directory)
            done = subprocess.run(
                [sys.executable, __file__, "--in-here", page], cwd=directory, check=False
            )
            if done.returncode:
                failed.append(page.name)
    print("pages with failures: " + ", ".join(failed) if failed else "all pages passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
