"""Downloads ONNX exports from the hub: the files of the chosen layout and variant alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from crl_export.hugging_face.cache import is_cached, label_of, license_of
from crl_export.hugging_face.hub import (
    PREFIX,
    Report,
    Repository,
    open_repository,
    small_files,
)
from crl_export.imported.layouts import find_layout
from crl_export.imported.reading import external_files
from crl_sdk.errors import ExportError


@dataclass(frozen=True, slots=True)
class Places:
    """Where an export is.

    Attributes:
        source: Directory of the export, or the ONNX file of an image tower.
        text: Directory or ONNX file of the text tower, if it is elsewhere.
    """

    source: Path
    text: Path | None

    @property
    def name(self) -> str:
        """Name of the model: that of the repository, directory or file."""
        return self.label.split("@")[0].split("/")[-1]

    @property
    def label(self) -> str:
        """Origin for the manifest: the repository with its commit, or the name of the directory."""
        label = label_of(self.source) if is_cached(self.source) else self.source.resolve().name
        if self.text is not None and is_cached(self.text):
            return f"{label}, texts {label_of(self.text)}"
        return label

    @property
    def license(self) -> str | None:
        """Licences that the model cards of the repositories name; None if they name none."""
        cached = [each for each in (self.source, self.text) if each and is_cached(each)]
        found = [license for each in cached if (license := license_of(each))]
        return " and ".join(dict.fromkeys(found)) or None


def fetch_export(
    source: str | Path,
    *,
    text_source: str | Path | None,
    text: bool,
    variant: str,
    text_variant: str | None,
    report: Report | None = None,
) -> Places:
    """Download what is needed of an export; what is on this machine stays where it is.

    Args:
        source: Directory or ONNX file of the export, or `hf:OWNER/REPO`.
        text_source: The same for the text tower, if it is elsewhere.
        text: Whether the text tower is needed.
        variant: Which of several files of a tower is needed, see `find_layout`.
        text_variant: The same for the text tower.
        report: Function that is called with the progress of downloads.

    Raises:
        ExportError: If a repository does not exist, has no ONNX export of the variant, or cannot be
            downloaded.
        MissingDependencyError: If huggingface_hub is not installed.
    """
    names = [str(source)] + ([] if text_source is None else [str(text_source)])
    repositories = {
        name: open_repository(name, "import") for name in names if name.startswith(PREFIX)
    }
    if not repositories:
        return Places(Path(source), None if text_source is None else Path(text_source))
    with TemporaryDirectory() as scratch:
        outlines = {
            name: _outline(repository, Path(scratch) / str(number))
            for number, (name, repository) in enumerate(repositories.items())
        }
        places = [outlines.get(name, Path(name)) for name in names]
        try:
            layout = find_layout(
                places[0],
                text=places[1] if len(places) > 1 else None,
                variant=variant,
                text_variant=text_variant,
            )
        except ExportError as error:
            message = str(error)
            for name, outline in outlines.items():
                message = message.replace(str(outline), name)
            raise ExportError(message) from error
        graphs = [layout.image] + ([layout.text] if text and layout.text is not None else [])
        for name, repository in repositories.items():
            outline = outlines[name]
            folders = {outline, layout.preprocess.parent, layout.text_directory}
            _download(
                repository,
                [_inside(each, outline) for each in graphs if each.is_relative_to(outline)],
                {
                    _inside(each, outline)
                    for each in folders
                    if each is not None and each.is_relative_to(outline)
                },
                report,
            )
    there = [repositories[n].directory if n in repositories else Path(n) for n in names]
    return Places(there[0], there[1] if len(there) > 1 else None)


def _outline(repository: Repository, directory: Path) -> Path:
    """Write empty files with the names that a repository has, from which its layout is found."""
    directory.mkdir()
    for name in repository.files:
        if name.endswith((".onnx", ".json", ".safetensors")):
            path = directory / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")
            except OSError as error:  # a name that is too long, or a file and a directory
                raise ExportError(
                    f"{PREFIX}{repository.name}: a file with a name that cannot be used here "
                    f"({error.strerror}: {name[:80]!r}); copy the files that are needed into a "
                    "directory and pass that"
                ) from error
    return directory


def _inside(path: Path, directory: Path) -> str:
    name = path.relative_to(directory).as_posix()
    return "" if name == "." else name


def _download(
    repository: Repository, graphs: list[str], folders: set[str], report: Report | None
) -> None:
    """Download graphs, the small files of folders, and the external data of the graphs."""
    small = [
        file
        for file in repository.files
        if file.rpartition("/")[0] in folders and small_files([file.rpartition("/")[2]])
    ]
    repository.download([*small, *dict.fromkeys(graphs)], report)
    data: dict[str, None] = {}
    for graph in graphs:
        folder = graph.rpartition("/")[0]
        for location in external_files(repository.directory / graph):
            file = f"{folder}/{location}" if folder else location
            if file in repository.files:  # the import says what is missing, or outside
                data[file] = None
    if data:
        repository.download(list(data), report)
