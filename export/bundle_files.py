"""Puts a further file into a bundle that exists."""

from __future__ import annotations

import msgspec

from crl_sdk.errors import ExportError
from crl_sdk.model._bundle import ModelBundle, sha256_file
from crl_sdk.model._manifest import FileEntry, write_manifest
from crl_sdk.storage._atomic_files import write_atomically


def put_file(bundle: ModelBundle, name: str, data: bytes) -> ModelBundle:
    """Write a file and list it in the manifest.

    The manifest names the file only while it is complete, so a killed process leaves a valid
    bundle, with or without the file.

    Args:
        bundle: The bundle.
        name: Name of the file. An existing one is replaced.
        data: Content.

    Returns:
        The bundle, opened and verified again.

    Raises:
        ExportError: If the bundle cannot be written.
    """
    path = bundle.path / name
    others = {each: entry for each, entry in bundle.manifest.files.items() if each != name}
    if len(others) < len(bundle.manifest.files):  # an old one is replaced: never list a mixture
        write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, files=others))
    write_atomically(path, data, ExportError)
    entry = FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)
    listed = {**others, name: entry}
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, files=listed))
    return ModelBundle.open(bundle.path)
