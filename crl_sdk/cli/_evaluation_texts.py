"""Sources of texts for `crl eval`: text files, bases and the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._basis import read_texts
from crl_sdk.cli._console import note
from crl_sdk.cli._options import DEFAULT_BASES, command
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._criterion_texts import CriterionTexts, texts_from_basis, texts_from_list


@dataclass(frozen=True, slots=True)
class TextSources:
    """Sources of texts from the command line.

    Attributes:
        texts: Text file by criterion.
        bases: Basis file by criterion.
        directory: Directory of bases; None if none is given.
        fingerprint: Fingerprint of the model.
        generate: Whether the language model writes missing texts.
        llm: Language model, see `crl_sdk.basis.LanguageModel.open`.
        own_words: Whether to use the words that the demo scenes are made from.
    """

    texts: Mapping[str, Path]
    bases: Mapping[str, Path]
    directory: Path | None
    fingerprint: str
    generate: bool
    llm: str | None
    own_words: bool

    def basis_file(self, criterion: str) -> Path | None:
        """Return the basis file that a criterion's texts come from; None for another source."""
        if criterion in self.texts:
            return None
        if criterion in self.bases:
            return self.bases[criterion]
        if self.directory is None:
            return None
        path = BasisDirectory(self.directory).path_of(criterion, self.fingerprint)
        return path if path.is_file() else None


def find_texts(
    criterion: str, sources: TextSources, prompt: str, embedder: Embedder
) -> CriterionTexts:
    """Return the texts of a criterion. A source given for this criterion comes first."""
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
    generated = generation.generate_texts(embedder, criterion, sources.llm, prompts=[prompt])
    texts = [each.text for each in generated.texts]
    note(f"  {criterion}: {', '.join(texts)}")
    return texts_from_list(texts, prompt, embedder.embed_text, "the local language model")


def require_texts(
    wanted: Sequence[str],
    sources: TextSources,
    prompts: Mapping[str, str],
    bundle: Path | None,
    name: str,
) -> None:
    """Raise an error before anything is embedded if a criterion has no texts.

    Args:
        wanted: Criteria that need texts.
        sources: Sources from the command line.
        prompts: Prompt by criterion, for the suggested command.
        bundle: Model bundle, for the suggested command; None for the demo model.
        name: Name of the benchmark.

    Raises:
        InvalidInputError: If a criterion has no texts, or a text file does not exist.
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
    where = sources.directory or DEFAULT_BASES
    make = command("basis", "create", first, "--prompt", prompts[first], bundle=bundle, bases=where)
    ways = [
        f"--texts {first}=FILE with one text per line",
        f"bases made with: {make}, and --bases {where}",
        "--generate, to let the local language model write the texts",
    ]
    if name == "demo":
        ways.append("--own-words, for the words that the scenes are made from")
    raise InvalidInputError(f"no texts for {', '.join(lacking)}: pass {'; or '.join(ways)}")


def check_prompts(given: Mapping[str, str], sources: TextSources) -> None:
    """Raise an error for prompts without effect and for malformed ones.

    Raises:
        InvalidInputError: If the criterion's texts come from a basis, or a prompt does not have
            exactly one `{}`.
    """
    for criterion, prompt in given.items():
        basis = sources.basis_file(criterion)
        if basis is not None:
            raise InvalidInputError(
                f"--prompt: the texts of {criterion} come from {basis}, which has its own "
                f"prompts: pass --texts {criterion}=FILE instead, or make the basis again"
            )
        if prompt.count("{}") != 1:
            raise InvalidInputError(
                f"--prompt: expected a template with exactly one {{}}, got {prompt!r}"
            )


def parse_pairs(option: str, given: Sequence[str] | None, known: Sequence[str]) -> dict[str, str]:
    """Parse `criterion=value` options. If there is one criterion, its name may be left out."""
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


def parse_basis_files(given: Sequence[str] | None, known: Sequence[str]) -> dict[str, Path]:
    """Parse `--basis FILE` and `--basis criterion=FILE`. A basis file names its criterion."""
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
                f"--basis: {path} is for the criterion {name!r}; expected {', '.join(known)}, each "
                "once: pass CRITERION=FILE to use it for another criterion"
            )
        files[name] = path
    return files
