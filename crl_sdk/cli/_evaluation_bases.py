"""Where `crl eval` takes the texts of a criterion from: lists, bases, the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis, basis_path
from crl_sdk.basis._generate import GenerationOptions
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._basis import read_texts
from crl_sdk.cli._console import note
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._criterion_texts import CriterionTexts, texts_from_basis, texts_from_list


@dataclass(frozen=True, slots=True)
class Sources:
    """Where texts come from, as given on the command line: per criterion, or for all."""

    texts: Mapping[str, Path]
    bases: Mapping[str, Path]
    directory: Path | None
    generate: bool
    llm: str | None
    own_words: bool

    def basis_file(self, criterion: str) -> Path | None:
        """Give the basis file that a criterion's texts come from; None if they do not."""
        if criterion in self.texts:
            return None
        if criterion in self.bases:
            return self.bases[criterion]
        path = basis_path(self.directory, criterion) if self.directory is not None else None
        return path if path is not None and path.is_file() else None


def texts_of(criterion: str, sources: Sources, prompt: str, embedder: Embedder) -> CriterionTexts:
    """Find a criterion's texts: the source given for it alone comes first."""
    if criterion in sources.texts:
        path = sources.texts[criterion]
        return texts_from_list(read_texts(path), prompt, embedder.embed_text, str(path))
    basis = sources.basis_file(criterion)
    if basis is not None:
        return texts_from_basis(Basis.load(basis), embedder.bundle.fingerprint, str(basis))
    if sources.own_words:
        from crl_export.demo.evaluate import own_words

        return texts_from_list(
            own_words(criterion), prompt, embedder.embed_text, "the world's own words"
        )
    draft = generation.draft(
        criterion, sources.llm, GenerationOptions(), embedder.embed_text, [prompt]
    )
    written = [candidate.text for candidate in draft.texts]
    note(f"  {criterion}: {', '.join(written)}")
    return texts_from_list(written, prompt, embedder.embed_text, "the local language model")


def require_texts(
    wanted: Sequence[str],
    sources: Sources,
    prompts: Mapping[str, str],
    bundle: Path | None,
    name: str,
) -> None:
    """Refuse, before anything is embedded, criteria without texts: say how to make them.

    Args:
        wanted: the criteria.
        sources: what was given.
        prompts: criterion → template, for the command that makes a basis.
        bundle: the model, likewise.
        name: of the benchmark.

    Raises:
        InvalidInputError: a criterion has no texts, or a list does not exist.
    """
    missing = [path for path in sources.texts.values() if not path.is_file()]
    if missing:
        raise InvalidInputError(f"--texts: there is no file {missing[0]}")
    if sources.generate or sources.own_words:
        return
    lacking = [c for c in wanted if c not in sources.texts and sources.basis_file(c) is None]
    if not lacking:
        return
    first = lacking[0]
    model = f" --bundle {bundle}" if bundle is not None else ""
    where = sources.directory or Path("bases")
    raise InvalidInputError(
        f"no texts for {', '.join(lacking)}. Give --texts {first}=FILE with one a line; or make "
        f"bases with: crl basis create {first}{model} --bases {where} --prompt '{prompts[first]}' "
        f"and pass --bases {where}; or let the local language model write them now with --generate"
        + ("; or take the words the scenes are made from with --own-words" * (name == "demo"))
    )


def check_prompts(given: Mapping[str, str], sources: Sources) -> None:
    """Refuse prompts that would change nothing, and those without a place for the text.

    Raises:
        InvalidInputError: the criterion's texts come from a basis; or not exactly one `{}`.
    """
    for criterion, prompt in given.items():
        basis = sources.basis_file(criterion)
        if basis is not None:
            raise InvalidInputError(
                f"--prompt: the texts of {criterion} come from {basis}, which has prompts of its "
                f"own: pass --texts {criterion}=FILE instead, or make the basis again"
            )
        if prompt.count("{}") != 1:
            raise InvalidInputError(
                f"--prompt: expected a template with exactly one {{}}, got {prompt!r}"
            )


def pairs(option: str, given: Sequence[str] | None, known: Sequence[str]) -> dict[str, str]:
    """Read `criterion=value`; a benchmark with one criterion may leave its name out."""
    found = {}
    for each in given or ():
        name, equals, value = each.partition("=")
        if not equals and len(known) == 1:
            name, value = known[0], each
        name = name.strip().lower()
        if name not in known or not value.strip():
            raise InvalidInputError(
                f"{option}: expected CRITERION=VALUE with a criterion of {', '.join(known)}, got "
                f"{each!r}"
            )
        if name in found:
            raise InvalidInputError(f"{option}: {name} is given twice")
        found[name] = value
    return found


def basis_files(given: Sequence[str] | None, known: Sequence[str]) -> dict[str, Path]:
    """Read `--basis`: the file itself tells its criterion, unless `criterion=` stands before it."""
    files = {}
    for each in given or ():
        name, equals, value = each.partition("=")
        if equals and name.strip().lower() in known:
            name, path = name.strip().lower(), Path(value)
            Basis.load(path)
        else:
            path = Path(each)
            name = Basis.load(path).criterion
        if name not in known or name in files:
            raise InvalidInputError(
                f"--basis: {path} is of the criterion {name!r}; expected {', '.join(known)}, each "
                "once: pass CRITERION=FILE to use it as another"
            )
        files[name] = path
    return files
