"""Read a Dockerfile: its stages, and the words of each instruction."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL",
    "USER", "WORKDIR",
}  # fmt: skip
"""Those that the Dockerfiles here use. Others are refused, so that none is passed over."""


@dataclass(frozen=True)
class Instruction:
    """An instruction and the text behind it, with continued lines joined."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words, of a JSON list or as a shell splits them."""
        if self.text.startswith("["):
            return [str(word) for word in json.loads(self.text)]
        return shlex.split(self.text)


@dataclass
class Stage:
    """One FROM and what follows it."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions if each.name == name]

    def last(self, name: str) -> Instruction | None:
        return found[-1] if (found := self.all(name)) else None


def read_stages(path: Path) -> list[Stage]:
    """Return the stages of a Dockerfile, with the ARGs before the first FROM filled in.

    Raises:
        ValueError: If a line is not an instruction that these Dockerfiles use.
    """
    stages: list[Stage] = []
    defaults: dict[str, str] = {}
    for number, line in _lines(path.read_text(encoding="utf-8")):
        name, _, text = line.partition(" ")
        text = text.strip()
        if name not in INSTRUCTIONS or not text:
            raise ValueError(f"{path}:{number}: expected an instruction, got {line!r}")
        if name == "ARG" and not stages:
            key, _, value = text.partition("=")
            defaults[key] = value
        elif name == "FROM":
            base, *rest = substitute(text, defaults).split()
            stage = rest[1] if rest and rest[0].upper() == "AS" else str(len(stages))
            stages.append(Stage(base, stage))
        elif stages:
            stages[-1].instructions.append(Instruction(name, text))
        else:
            raise ValueError(f"{path}:{number}: {name} comes before the first FROM")
    return stages


def environment(stage: Stage, before: dict[str, str]) -> dict[str, str]:
    """Return the environment of a stage: `before` and its ENV lines."""
    found = dict(before)
    for instruction in stage.all("ENV"):
        for word in instruction.words:
            key, _, value = word.partition("=")
            found[key] = substitute(value, found)
    return found


def substitute(text: str, values: dict[str, str]) -> str:
    """Replace `$NAME` and `${NAME}`. A name without a value is a KeyError."""
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda found: values[found[1] or found[2]], text)


def _lines(text: str) -> list[tuple[int, str]]:
    joined: list[tuple[int, str]] = []
    continued = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        body = line.strip()
        more = body.endswith("\\")
        body = body.removesuffix("\\").strip()
        if continued:
            first, before = joined[-1]
            joined[-1] = first, f"{before} {body}"
        else:
            joined.append((number, body))
        continued = more
    return joined
