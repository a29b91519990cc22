"""A class for `ray.data.Dataset.map_batches` that embeds the images of a batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crl_sdk.basis._basis import Basis
from crl_sdk.errors import InvalidInputError
from crl_sdk.integrations.ray._cluster import use_assigned_processors
from crl_sdk.model._preprocess import DEFAULT_LIMITS, Decode, ImageLimits
from crl_sdk.stored._directory import ERROR, UNIVERSAL

if TYPE_CHECKING:
    from crl_sdk._embedder import Embedder
    from crl_sdk._embeddings import Embeddings

_COLUMNS = ("image", "bytes", "path")
"""Columns that are looked for, the first that a batch has."""


class EmbedImages:
    """Embeds the images of each batch; for `map_batches`, which makes one for each actor.

    A batch has a column of images, `image` (encoded bytes or uint8 arrays), `bytes` or `path`. The
    result has the other columns of the batch and `path`, and: `universal`, a column for each
    criterion, and `error`. An image that cannot be read is a row with a reason and no embeddings:
    NaN in NumPy batches, null in Arrow tables.

    Attributes:
        embedder: Model with its bases.

    Example:
        With Ray, on a cluster whose nodes have the bundle at this path:

            dataset = ray.data.read_binary_files("pictures", include_paths=True)
            dataset.map_batches(
                EmbedImages,
                fn_constructor_kwargs={"bundle": "clip-b32", "bases": ["bases/color.safetensors"]},
                batch_size=64, batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=4),
                num_cpus=2,
            ).write_parquet("embeddings")
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        bases: Sequence[Basis | str | os.PathLike[str]] = (),
        *,
        fingerprint: str | None = None,
        column: str | None = None,
        engine: str = "auto",
        threads: int | None = None,
        decode: Decode = "exact",
        limits: ImageLimits = DEFAULT_LIMITS,
        engine_batch: int = 32,
    ) -> None:
        """Open the model with as many threads as Ray has assigned processors to this actor.

        Args:
            bundle: Directory that `crl export` wrote, at the same path on each node; or
                `crl_sdk.demo_bundle()`.
            bases: Bases, or paths of their files. A basis is sent to the actors as it is now; a
                file is read when an actor starts, so that a change in between makes two versions.
            fingerprint: Fingerprint that the bundle must have on each node, or None for any.
            column: Column of images. None for the first of `image`, `bytes` and `path`.
            engine: Engine, see `crl_sdk.Embedder.open`.
            threads: Number of threads of an engine run; None for the assigned processors.
            decode: How JPEGs are decoded, see `crl_sdk.model.load_pixels`.
            limits: Limits above which images are refused.
            engine_batch: Number of images per engine run. An int8 engine depends on it.

        Raises:
            InvalidInputError: If a criterion has the name of another column.
            BundleError: If there is no such bundle.
            BasisMismatchError: If a basis or `fingerprint` belongs to another model.
            EngineError: If the engine cannot run there.
        """
        from crl_sdk._embedder import Embedder
        from crl_sdk.model._bundle import ModelBundle
        from crl_sdk.model._fingerprint import require_same_model

        use_assigned_processors()
        opened = ModelBundle.open(bundle)
        if fingerprint is not None:
            require_same_model(
                "the job", fingerprint, opened.fingerprint, used_with=f"{opened.path} on this node",
                remedy="copy the bundle to each node",
            )  # fmt: skip
        self._column = column
        self._batch = engine_batch
        self.embedder: Embedder = Embedder.open(
            opened, engine=engine, threads=threads, limits=limits, decode=decode
        )
        self._bases = [self.embedder.add_basis(basis) for basis in bases]
        for basis in self._bases:
            if basis.criterion in (UNIVERSAL, ERROR, *_COLUMNS, column):
                raise InvalidInputError(
                    f"a column is named {basis.criterion!r}: make the basis of another criterion"
                )

    def __call__(self, batch: Any) -> Any:
        """Return a batch with its embeddings.

        Args:
            batch: Columns as NumPy arrays by name, or an Arrow table.

        Returns:
            A batch of the same kind.

        Raises:
            InvalidInputError: If it is of another kind or has no column of images.
            EngineError: If an engine run fails.
        """
        if isinstance(batch, Mapping):
            column = self._find(batch)
            result = self._embed(list(batch[column]))
            kept = {name: batch[name] for name in batch if name != column or name == "path"}
            reasons = _reasons(result)
            return {
                **kept, UNIVERSAL: result.universal, **result.conditional,
                ERROR: np.array(reasons, dtype=object),
            }  # fmt: skip
        if not hasattr(batch, "column_names"):
            raise InvalidInputError(
                "expected a batch of NumPy arrays or an Arrow table, got "
                f'{type(batch).__name__}: pass batch_format="numpy" or "pyarrow" to map_batches'
            )
        import pyarrow as pa

        column = self._find(batch.column_names)
        result = self._embed(batch[column].to_pylist())
        table = batch if column == "path" else batch.drop_columns([column])
        bad = pa.array(~result.ok)
        for name, rows in {UNIVERSAL: result.universal, **result.conditional}.items():
            values = pa.array(rows.ravel())
            table = table.append_column(
                name, pa.FixedSizeListArray.from_arrays(values, rows.shape[1], mask=bad)
            )
        return table.append_column(ERROR, pa.array(_reasons(result), pa.string()))

    def _find(self, names: Any) -> str:
        """Return the column of images."""
        wanted = _COLUMNS if self._column is None else (self._column,)
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise InvalidInputError(
                f"expected a column of images, {' or '.join(map(repr, wanted))}; got "
                f"{sorted(names)}: name it with column=…"
            )
        made = {UNIVERSAL, ERROR, *(basis.criterion for basis in self._bases)}
        if there := sorted(made & set(names)):
            raise InvalidInputError(
                f"the batch has a column {there[0]!r} already: rename it with rename_columns"
            )
        return found

    def _embed(self, images: list[Any]) -> Embeddings:
        return self.embedder.embed(
            [b"" if image is None else image for image in images], self._bases,
            batch_size=self._batch, on_error="collect",
        )  # fmt: skip


def _reasons(result: Embeddings) -> list[str | None]:
    """Return for each image why it has no embeddings, or None."""
    errors = result.errors
    return [errors[i].reason if i in errors else None for i in range(len(result.universal))]
