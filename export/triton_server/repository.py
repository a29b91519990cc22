"""Writes model repositories of Triton from bundles and bases, and adds bases to them.

```
repository/
  crl-repository.json                what the repository was made from; Triton ignores files here
  crl_decode/1/model.py              encoded images to pixels, with the SDK's own preprocessing
  crl_tower/1/model.onnx             pixels to universal embeddings
  crl_basis_animal_habitat/1/…       universal to conditional embeddings; 2/… after an update
  crl_pixels_animal_habitat/…        ensemble of tower and basis
  crl_animal_habitat/config.pbtxt    ensemble of the decoding and the ensemble above
```
"""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

import crl_sdk
from crl_export.triton_server import configs
from crl_export.triton_server.configs import Accelerator, Backend, Device, Message, Tower
from crl_export.triton_server.graphs import UNIT, write_basis, write_tower
from crl_sdk._version import __version__
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.engines._tensorrt_plans import (
    Plan,
    compile_command,
    graph_digest,
    load_plan,
    plans_directory,
    read_plans,
)
from crl_sdk.errors import BasisError, ExportError, InvalidInputError, PlanError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision
from crl_sdk.storage._atomic_files import (
    new_directory,
    read_record,
    write_atomically,
    write_record,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECORD, SCHEMA = "crl-repository.json", 1
"""Record of a repository, and the version of its format."""

MAX_BATCH = 1024

_SOURCES = Path(crl_sdk.__file__).parents[1]

Progress = Callable[[str, int, int], None]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How Triton runs the models.

    Attributes:
        backend: What runs the tower.
        precision: Precision of the tower.
        device: Device of the tower.
        accelerator: Execution accelerator of ONNX Runtime, or None.
        instances: Number of instances of the tower, on each device.
        threads: Threads of a run of the tower on a CPU; None leaves it to ONNX Runtime.
        max_batch: Largest batch that Triton forms.
    """

    backend: Backend = "onnxruntime"
    precision: Precision = "fp32"
    device: Device = "cpu"
    accelerator: Accelerator | None = None
    instances: int = 1
    threads: int | None = None
    max_batch: int = 32


class ServedBasis(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A basis in a repository.

    Attributes:
        name: Name of its criterion in the names of models.
        version: Number of its newest version folder.
        sha256: SHA-256 of the basis.
    """

    name: str
    version: int
    sha256: str


class Repository(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a repository was made from, `crl-repository.json`.

    Attributes:
        schema: Version of this record's format.
        fingerprint: Fingerprint of the bundle.
        graph_sha256: SHA-256 of the bundle's image graph.
        options: How Triton runs the models.
        bases: The bases by criterion.
    """

    schema: int
    fingerprint: str
    graph_sha256: str
    options: Options
    bases: dict[str, ServedBasis]


@dataclass(frozen=True, slots=True)
class Written:
    """Result of an export or update.

    Attributes:
        path: Directory of the repository.
        repository: Its record.
        load: Names of the ensembles from encoded images that are new or have changed. To load one
            loads all models of its criterion.
        kept: Criteria of the repository that the directory of bases does not have.
    """

    path: Path
    repository: Repository
    load: tuple[str, ...]
    kept: tuple[str, ...] = ()


def export_repository(
    bundle: ModelBundle,
    bases: Path,
    out: Path,
    options: Options,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> Written:
    """Write a new repository: complete, or not at all.

    Args:
        bundle: Model bundle.
        bases: Directory of bases; all of this model are exported.
        out: Directory to create.
        options: How Triton runs the models.
        progress: Function that is called with the current stage, the number of models that are
            done, and their total number.

    Raises:
        InvalidInputError: If an option is out of range, two options contradict each other, `out`
            exists, or two models would have the same name.
        BundleError: If the bundle has no graph in this precision.
        BasisError: If there is no basis of this model.
        BasisMismatchError: If a basis was made for another model.
        PlanError: If the backend is `tensorrt` and the bundle has no plan for it.
        ParityError: If a graph differs from what it was made of.
        ExportError: If the repository cannot be written.
    """
    _check_options(options)
    if out.exists() or out.is_symlink():
        raise InvalidInputError(
            f"{out}: exists already; choose another name, or pass --update to add the new bases "
            "to this repository"
        )
    if not out.parent.is_dir():
        raise InvalidInputError(f"{out}: expected an existing directory {out.parent}; create it")
    graph = graph_digest(bundle, options.precision)
    loaded = _load_bases(bundle, bases)
    names = model_names(loaded)
    plan = _choose_plan(bundle, options) if options.backend == "tensorrt" else None
    tower = _tower(bundle, options)
    with new_directory(out, ExportError) as work:
        progress("decoding", 0, len(loaded) + 2)
        _write_decoder(bundle, work / configs.DECODE, tower)
        progress("tower", 1, len(loaded) + 2)
        _write_tower(bundle, work / configs.TOWER, tower, graph, plan)
        served = {}
        for done, (criterion, basis) in enumerate(loaded.items(), 2):
            progress(criterion, done, len(loaded) + 2)
            name = names[criterion]
            served[criterion] = _write_basis(basis, name, 1, work, tower)
        repository = Repository(
            schema=SCHEMA, fingerprint=bundle.fingerprint, graph_sha256=graph, options=options,
            bases=served,
        )  # fmt: skip
        write_record(work / RECORD, repository, ExportError)
    return Written(out, repository, _ensembles(names.values()))


def update_repository(
    bundle: ModelBundle,
    bases: Path,
    out: Path,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> Written:
    """Add the bases to a repository that it does not have, and new versions of those that changed.

    A running server sees nothing of it before it is told to load the ensembles. If this process is
    killed, the next update completes the work.

    Args:
        bundle: Model bundle that the repository was made from.
        bases: Directory of bases. Criteria that only the repository has stay in it.
        out: Directory of the repository.
        progress: As in `export_repository`.

    Raises:
        InvalidInputError: If two models would have the same name.
        ExportError: If `out` is no repository of this bundle, another process updates it, or it
            cannot be written.
        BasisError: If there is no basis of this model.
        BasisMismatchError: If a basis was made for another model.
        ParityError: If a graph differs from what it was made of.
    """
    remedy = "expected a repository that crl export-triton wrote; leave out --update for a new one"
    with _locked(out, remedy):
        found = read_record(out / RECORD, Repository, SCHEMA, ExportError, remedy)
        return _update(bundle, bases, out, found, progress)


@contextmanager
def _locked(folder: Path, remedy: str) -> Iterator[None]:
    """Keep other processes from updating a repository; the lock ends with this process."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be read ({error.strerror}); {remedy}") from error
    try:
        if fcntl is not None:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ExportError(f"{folder}: another process updates it; wait for it") from error
    finally:
        os.close(opened)


def _update(
    bundle: ModelBundle, bases: Path, out: Path, found: Repository, progress: Progress
) -> Written:
    graph = graph_digest(bundle, found.options.precision)
    if (found.fingerprint, found.graph_sha256) != (bundle.fingerprint, graph):
        raise ExportError(
            f"{out}: made from model {found.fingerprint[:12]}… with the graph "
            f"{found.graph_sha256[:12]}…, {bundle.path} is {bundle.fingerprint[:12]}… with "
            f"{graph[:12]}…: name the bundle it was made from, or write a new repository"
        )
    loaded = _load_bases(bundle, bases)
    names = model_names([*found.bases, *(each for each in loaded if each not in found.bases)])
    tower = _tower(bundle, found.options)
    served, changed = dict(found.bases), []
    for done, (criterion, basis) in enumerate(loaded.items()):
        progress(criterion, done, len(loaded))
        known = found.bases.get(criterion)
        if known is not None and known.sha256 == basis.sha256():
            continue
        version = _newest_version(out / configs.basis_model(names[criterion])) + 1
        try:
            served[criterion] = _write_basis(basis, names[criterion], version, out, tower)
        except OSError as error:
            raise ExportError(
                f"{out}: cannot be written ({error.strerror or error}); check the directory and "
                "free space, and run the command again"
            ) from error
        changed.append(names[criterion])
    repository = msgspec.structs.replace(found, bases=served)
    write_record(out / RECORD, repository, ExportError)
    kept = tuple(criterion for criterion in found.bases if criterion not in loaded)
    return Written(out, repository, _ensembles(changed), kept)


def model_names(criteria: Iterable[str]) -> dict[str, str]:
    """Return the name of each criterion in the names of models: spaces become `_`.

    Raises:
        InvalidInputError: If two models would have the same name.

    Example:
        >>> model_names(["animal habitat"])
        {'animal habitat': 'animal_habitat'}
    """
    owners = {configs.DECODE: "the decoding of images", configs.TOWER: "the image tower"}
    names = {}
    for criterion in criteria:
        name = names[criterion] = criterion.replace(" ", "_")
        for model in (configs.basis_model(name), *configs.ensembles(name)):
            if model in owners:
                raise InvalidInputError(
                    f"criterion {criterion!r} and {owners[model]} would both have the Triton model "
                    f"{model!r}; make the basis again under another name (crl basis create NAME) "
                    "and delete this one"
                )
            owners[model] = f"criterion {criterion!r}"
    return names


def _check_options(options: Options) -> None:
    if not 1 <= options.max_batch <= MAX_BATCH:
        raise InvalidInputError(
            f"expected --max-batch from 1 to {MAX_BATCH}, got {options.max_batch}"
        )
    for flag, value in (("--instances", options.instances), ("--threads", options.threads)):
        if value is not None and value < 1:
            raise InvalidInputError(f"expected {flag} of at least 1, got {value}")
    faults = {
        "--backend tensorrt needs --device gpu": (
            options.backend == "tensorrt" and options.device == "cpu"
        ),
        "--backend python runs on the CPU: leave out --device gpu": (
            options.backend == "python" and options.device == "gpu"
        ),
        "--backend tensorrt has no int8: choose --precision fp16 or fp32": (
            options.backend == "tensorrt" and options.precision == "int8"
        ),
        "--accelerator needs --backend onnxruntime": (
            options.accelerator is not None and options.backend != "onnxruntime"
        ),
        "--accelerator tensorrt needs --device gpu": (
            options.accelerator == "tensorrt" and options.device == "cpu"
        ),
        "--accelerator openvino needs --device cpu": (
            options.accelerator == "openvino" and options.device == "gpu"
        ),
        "--accelerator tensorrt has no int8: choose --precision fp16 or fp32": (
            options.accelerator == "tensorrt" and options.precision == "int8"
        ),
    }
    for fault, present in faults.items():
        if present:
            raise InvalidInputError(fault)


def _load_bases(bundle: ModelBundle, directory: Path) -> dict[str, Basis]:
    """Return all bases of a model by criterion."""
    there = BasisDirectory(directory)
    criteria = there.criteria(bundle.fingerprint)
    if not criteria:
        others = ", ".join(sorted(set(there.criteria()))) or "none"
        raise BasisError(
            f"{directory}: expected bases of the model {bundle.fingerprint[:12]}… in "
            f"{there.of_model(bundle.fingerprint)}, found none (of other models: {others}); make "
            f"one: crl basis create CRITERION --bundle {bundle.path} --bases {directory}"
        )
    return {each: there.load(each, bundle.fingerprint) for each in criteria}


def _tower(bundle: ModelBundle, options: Options) -> Tower:
    return Tower(
        **msgspec.structs.asdict(options),
        preprocess=bundle.preprocess,
        dim=bundle.embedding_dim,
        described={
            "crl_fingerprint": bundle.fingerprint, "crl_model": bundle.manifest.name,
            "crl_version": __version__,
        },
    )  # fmt: skip


def _write_decoder(bundle: ModelBundle, folder: Path, tower: Tower) -> None:
    version = folder / "1"
    _write_step("decode_step", version)
    spec = msgspec.json.format(msgspec.json.encode(bundle.preprocess), indent=2)
    (version / "preprocess.json").write_bytes(spec + b"\n")
    step = Path(__file__).with_name("decode_step.py")
    for source in _with_imports(step) - {step}:
        target = version / source.relative_to(_SOURCES)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        (target.parent / "__init__.py").touch()
    _write_config(folder, configs.decode_config(tower))


def _with_imports(module: Path) -> set[Path]:
    """Return the file of a module of crl_sdk, and those of all that it imports from crl_sdk."""
    found, waiting = set(), [module]
    while waiting:
        file = waiting.pop()
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("crl_sdk."):
                each = _SOURCES.joinpath(*str(node.module).split(".")).with_suffix(".py")
                if each not in found:
                    waiting.append(each)
    return found


def _write_tower(
    bundle: ModelBundle, folder: Path, tower: Tower, graph: str, plan: Plan | None
) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    described = {"crl_precision": tower.precision, "crl_graph_sha256": graph}
    columns = None
    if plan is None:
        difference = write_tower(bundle, tower.precision, version / "model.onnx")
        described["crl_difference_from_bundle"] = f"{difference:.1e}"
    else:
        data = load_plan(bundle, plans_directory(bundle), plan)
        (version / "model.plan").write_bytes(data)
        spec = plan.spec
        described |= {
            "crl_plan": spec.stem, "crl_plan_tensorrt": spec.runtime_version,
            "crl_plan_architectures": ",".join(spec.architectures),
        }  # fmt: skip
        columns = next(each.shape[1] for each in plan.outputs if each.name != UNIT)
    if tower.backend == "python":
        _write_step("onnx_step", version)
    _write_config(folder, configs.tower_config(tower, described, columns))


def _write_basis(
    basis: Basis, name: str, version: int, repository: Path, tower: Tower
) -> ServedBasis:
    """Write a new version of a basis, and then the configurations that describe it."""
    folder = repository / configs.basis_model(name)
    folder.mkdir(exist_ok=True)
    with new_directory(folder / str(version), ExportError) as work:
        write_basis(basis, work / "model.onnx")
        if tower.backend == "python":
            _write_step("onnx_step", work)
    columns, sha256 = basis.projection.output_dim, basis.sha256()
    described = {
        "crl_criterion": basis.criterion, "crl_basis_sha256": sha256, "crl_method": basis.method,
    }  # fmt: skip
    _write_config(folder, configs.basis_config(name, columns, tower, described))
    for model, config in configs.ensemble_configs(name, columns, tower, described).items():
        # Triton wants a version folder, and object stores have no empty ones
        keep = repository / model / "1" / ".keep"
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.touch()
        _write_config(repository / model, config)
    return ServedBasis(name=name, version=version, sha256=sha256)


def _write_step(module: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name(f"{module}.py"), folder / "model.py")


def _write_config(folder: Path, config: Message) -> None:
    text = "# Written by crl export-triton.\n" + configs.to_text(config)
    write_atomically(folder / "config.pbtxt", text.encode(), ExportError)


def _newest_version(folder: Path) -> int:
    versions = [each.name for each in folder.glob("*") if each.name.isdecimal()]
    return max(map(int, versions), default=0)


def _ensembles(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(configs.ensembles(name)[0] for name in names)


def _choose_plan(bundle: ModelBundle, options: Options) -> Plan:
    """Return the plan that Triton's backend can batch: one that takes images alone.

    That is a plan with a baked basis. Any will do, because only its universal embeddings are used.
    """
    directory = plans_directory(bundle)
    fits, reasons = [], []
    for plan in read_plans(directory):
        spec = plan.spec
        if spec.runtime != "tensorrt":
            reason = f"for {spec.runtime}, which Triton's backend does not load"
        elif spec.precision != options.precision:
            reason = f"in {spec.precision}"
        elif spec.baked is None:
            reason = "its inputs weight and bias have no batch dimension"
        elif spec.batch[2] < options.max_batch:
            reason = f"for at most {spec.batch[2]} images"
        else:
            fits.append(plan)
            continue
        reasons.append(f"{spec.stem}: {reason}")
    machines = {(plan.spec.runtime_version, plan.spec.architectures) for plan in fits}
    if len(machines) > 1:
        raise PlanError(
            f"{directory}: expected plans for one kind of GPU and TensorRT, got "
            f"{', '.join(plan.spec.stem for plan in fits)}; move the others away"
        )
    if not fits:
        command = compile_command(bundle, "tensorrt", options.precision, "")
        batch = f"1:{min(8, options.max_batch)}:{options.max_batch}"
        raise PlanError(
            f"{directory}: no plan that Triton can batch ({'; '.join(reasons) or 'no plans'}); "
            f"compile one on the GPU's machine: {command} --batch {batch} --baked BASIS_FILE; or "
            "pass --backend onnxruntime --accelerator tensorrt, which needs none"
        )
    return fits[0]
