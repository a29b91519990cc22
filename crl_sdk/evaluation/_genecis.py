"""GeneCIS, "focus on an object" and "change an object": the same scene with a given thing in it.

Layout: github.com/facebookresearch/genecis (its templates) and COCO's 2017 validation pictures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.evaluation._labelled import (
    DataSetError,
    require_directory,
    require_files,
    wrong_layout,
)

TASKS = ("focus", "change")
PICTURES = "val2017"


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One search: which picture of the gallery shows the reference's scene with the condition.

    Attributes:
        reference: position of the query picture in `GeneCis.files`.
        gallery: positions of the pictures to choose from, (g,) int64; the target is the first.
        condition: the thing, such as `table`.
    """

    reference: int
    gallery: NDArray[np.int64]
    condition: str


@dataclass(frozen=True, slots=True, eq=False)
class GeneCis:
    """A task of GeneCIS.

    Attributes:
        files: the pictures, each once.
        queries: in the order of the file.
        notes: what the user should know of how it was read.
    """

    files: tuple[Path, ...]
    queries: tuple[Query, ...]
    notes: tuple[str, ...] = ()

    def part(self, count: int, seed: int = 0) -> GeneCis:
        """Give some of the queries at random, with their pictures: not the benchmark's figures."""
        if count >= len(self.queries):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.queries))[:count])
        queries = [self.queries[i] for i in chosen]
        used = np.unique(np.concatenate([[q.reference, *q.gallery] for q in queries]))
        place = np.full(len(self.files), -1, np.int64)
        place[used] = np.arange(len(used))
        return GeneCis(
            tuple(self.files[i] for i in used),
            tuple(Query(int(place[q.reference]), place[q.gallery], q.condition) for q in queries),
            (*self.notes, f"a random part: {count} of {len(self.queries)} queries, "
             "not the benchmark"),
        )  # fmt: skip


def layout(task: str) -> str:
    """Say what the directory of a task (`focus` or `change`) looks like."""
    return (
        f"GeneCIS: genecis/{task}_object.json and {PICTURES}/ with COCO's 2017 validation pictures"
    )


def read_genecis(root: Path, task: str) -> GeneCis:
    """Read one task of GeneCIS.

    Args:
        root: holds `focus_object.json` and `change_object.json`, itself or under `genecis/`, and
            COCO's pictures under `val2017/` or `coco/val2017/`.
        task: `focus` or `change`.

    Raises:
        DataSetError: another layout, an entry without its fields, or a missing picture.
    """
    name, expected = f"{task}_object.json", layout(task)
    require_directory(root, expected)
    template = next((p for p in (root / "genecis" / name, root / name) if p.is_file()), None)
    if template is None:
        old = (root / "genecis" / f"{task}_object.pkl", root / f"{task}_object.pkl")
        pickled = next((p for p in old if p.is_file()), None)
        raise wrong_layout(
            root,
            expected,
            f"{pickled} is an early version of the templates, a pickle, which is not read: get the "
            "JSON of the repository's main branch"
            if pickled
            else "",
        )
    pictures = next((p for p in (root / PICTURES, root / "coco" / PICTURES) if p.is_dir()), None)
    if pictures is None:
        raise wrong_layout(root, expected)
    entries = _entries(template)
    position: dict[int, int] = {}

    def place(sample: Any, where: str) -> int:
        number = sample.get("val_image_id") if isinstance(sample, dict) else None
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise DataSetError(
                f"{template}, {where}: expected a sample with a whole number `val_image_id`, found "
                f"{str(sample)[:80]}"
            )
        return position.setdefault(number, len(position))

    queries = []
    for i, entry in enumerate(entries):
        where = f"entry {i}"
        reference = place(entry["reference"], where)
        gallery = [place(s, where) for s in (entry["target"], *entry["gallery"])]
        queries.append(Query(reference, np.array(gallery, np.int64), entry["condition"].strip()))
    files = tuple(pictures / f"{number:012d}.jpg" for number in position)
    require_files(root, files)
    sizes = sorted({len(query.gallery) for query in queries})
    notes = (f"{len(queries)} queries, galleries of {' or '.join(map(str, sizes))} pictures",)
    return GeneCis(files, tuple(queries), notes)


def _entries(template: Path) -> list[dict[str, Any]]:
    try:
        raw: Any = json.loads(template.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataSetError(f"{template}: expected JSON, a list of queries ({error})") from error
    if not isinstance(raw, list) or not raw:
        raise DataSetError(f"{template}: expected a JSON list of queries, found {str(raw)[:80]}")
    for i, entry in enumerate(raw):
        fine = (
            isinstance(entry, dict)
            and {"reference", "target", "gallery", "condition"} <= entry.keys()
            and isinstance(entry["gallery"], list)
            and len(entry["gallery"]) > 0
            and isinstance(entry["condition"], str)
            and entry["condition"].strip() != ""
        )
        if not fine:
            raise DataSetError(
                f"{template}, entry {i}: expected reference, target, a gallery of one picture or "
                f"more and a condition in words, found {str(entry)[:120]}"
            )
    return raw
