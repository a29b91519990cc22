"""GeneCIS, tasks "focus on an object" and "change an object": find a scene with a given object.

Layout: github.com/facebookresearch/genecis (its templates) and COCO's 2017 validation images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.evaluation._dataset import (
    DataSetError,
    require_directory,
    require_files,
    wrong_layout,
)

TASKS = ("focus", "change")
_COCO = "val2017"


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One query: which image of the gallery shows the scene of the reference and the condition.

    Attributes:
        reference: Position of the reference image in `GeneCis.files`.
        gallery: Positions of the images to choose from, shape (g,), int64. The first is the target.
        condition: The object that the target shows, such as `table`.
    """

    reference: int
    gallery: NDArray[np.int64]
    condition: str


@dataclass(frozen=True, slots=True, eq=False)
class GeneCis:
    """One task of GeneCIS.

    Attributes:
        files: Images, each once.
        queries: Queries, in the order of the template file.
        notes: Remarks on how the data set was read.
    """

    files: tuple[Path, ...]
    queries: tuple[Query, ...]
    notes: tuple[str, ...] = ()

    def sample(self, count: int, seed: int = 0) -> GeneCis:
        """Return a random sample of the queries, with their images.

        The results on a sample are not those of the benchmark.

        Args:
            count: Number of queries to keep.
            seed: Seed of the choice. Equal seeds give equal samples.
        """
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
            (*self.notes, f"a random sample of {count} of {len(self.queries)} queries, "
             "not the whole benchmark"),
        )  # fmt: skip


def layout(task: str) -> str:
    """Return a description of the directory of a task, `focus` or `change`."""
    return f"GeneCIS: genecis/{task}_object.json and {_COCO}/ with COCO's 2017 validation images"


def read_genecis(root: Path, task: str) -> GeneCis:
    """Read one task of GeneCIS.

    Args:
        root: Directory that holds `focus_object.json` and `change_object.json`, itself or under
            `genecis/`, and COCO's images under `val2017/` or `coco/val2017/`.
        task: `focus` or `change`.

    Raises:
        DataSetError: If the layout is another one, an entry lacks a field, or an image is missing.
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
            f"{pickled} is an early version of the templates in pickle format, which is not read: "
            "get the JSON file of the repository's main branch"
            if pickled
            else "",
        )
    images = next((p for p in (root / _COCO, root / "coco" / _COCO) if p.is_dir()), None)
    if images is None:
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
    files = tuple(images / f"{number:012d}.jpg" for number in position)
    require_files(root, files)
    sizes = sorted({len(query.gallery) for query in queries})
    notes = (f"{len(queries)} queries, galleries of {' or '.join(map(str, sizes))} images",)
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
                f"{template}, entry {i}: expected reference, target, a gallery of at least one "
                f"image and a condition in words, found {str(entry)[:120]}"
            )
    return raw
