"""`--check PICTURE TEXT…` of `crl export` and `crl import`: shows whether a new bundle works."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from crl_sdk.cli._console import out, warn
from crl_sdk.errors import InvalidInputError
from crl_sdk.model._bundle import ModelBundle

CheckOption = Annotated[
    Path | None,
    typer.Option(help="A picture to compare with the texts, to see at once that it works."),
]
CheckTexts = Annotated[
    list[str] | None, typer.Argument(help="Texts to compare with the picture of --check.")
]

_SMALL_SPREAD = 0.01
"""Texts of different meaning whose similarities to a picture differ by less hardly differ."""


@dataclass(frozen=True, slots=True)
class PictureCheck:
    """A picture, and texts to compare it with.

    Attributes:
        picture: Path of the picture.
        texts: The texts.
    """

    picture: Path
    texts: list[str]

    def compare(self, bundle: ModelBundle) -> dict[str, float]:
        """Return the cosine of the picture with each text; warn if the texts hardly differ."""
        from crl_sdk._embedder import Embedder

        if bundle.manifest.text is None:
            raise InvalidInputError(
                "--check needs a text tower, which this model does not have: pass --text-model DIR"
            )
        with Embedder.open(bundle) as embedder:
            rows = embedder.embed([self.picture]).universal @ embedder.embed_text(self.texts).T
        found = {each: float(value) for each, value in zip(self.texts, rows[0], strict=True)}
        if len(found) > 1 and max(found.values()) - min(found.values()) < _SMALL_SPREAD:
            warn(
                f"the similarities differ by less than {_SMALL_SPREAD}: if the texts mean "
                "different things, the tokenizer or the preprocessing is not that of the model, or "
                "its weights are random"
            )
        return found

    def print(self, similarities: dict[str, float]) -> None:
        """Print the texts with their similarities, the largest first."""
        from rich.table import Table

        table = Table("text", f"cosine with {self.picture}")
        for each, value in sorted(similarities.items(), key=lambda item: -item[1]):
            table.add_row(each, f"{value:.4f}")
        out.print(table)


def read_check(picture: Path | None, texts: list[str] | None, command: str) -> PictureCheck | None:
    """Check the picture and the texts of `--check`, before a bundle is made.

    Args:
        picture: Path of the picture; None if there is no check.
        texts: The texts; None if there are none.
        command: The command so far, for the message.

    Raises:
        InvalidInputError: If one of the two is missing, or a text is blank.
        ImageError: If the picture cannot be decoded.
    """
    from crl_sdk.model._preprocess import PreprocessSpec, load_pixels

    if bool(texts) != (picture is not None):
        raise InvalidInputError(
            f"--check PICTURE and texts belong together: {command} --out BUNDLE --check cat.jpg "
            '"a cat" "a dog"'
        )
    if picture is None or texts is None:
        return None
    if not picture.is_file():
        raise InvalidInputError(f"{picture}: no such picture; check --check")
    if not all(each.strip() for each in texts):
        raise InvalidInputError("--check: a text has no visible characters: leave it out")
    load_pixels(picture, PreprocessSpec(8, 8, mean=(0.5,) * 3, std=(0.5,) * 3))
    return PictureCheck(picture, texts)
