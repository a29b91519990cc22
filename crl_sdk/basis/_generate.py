"""Generate the texts of a criterion: ask a language model, and keep the texts to be trusted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._asking import Answers, ReportProgress, ask, describe
from crl_sdk.basis._build import DEFAULT_PROMPT, EmbedText, check_prompts, embed_with_prompts
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS, GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._picture_votes import NEVER_FIRES, PictureVotes, vote
from crl_sdk.basis._picture_votes import describe as describe_votes
from crl_sdk.basis._relevance import MIN_RELEVANCE, relevance
from crl_sdk.basis._votes import RankedText, text_key
from crl_sdk.errors import GenerationError
from crl_sdk.projection._projection import normalise_rows

MIN_TEXTS = 3
"""Smallest number of trusted texts. With fewer, the model does not know the criterion."""

LIKELY, SURE = 1 / 16, 1 / 4
"""Share of the answers from which a text is kept if it is relevant enough, and from which it is
kept in any case."""

RELEVANT = 4.0
"""Relevance, in nats, that a text without votes would need. It falls linearly to 0 at `SURE`."""

TYPICAL, TYPICAL_TEXTS = 1 / 3, 10
"""Where even the most frequent texts are rare, `LIKELY` is lowered to this part of the mean share
of so many of them, and `SURE` with it."""

MIN_DISTANCE = 0.07
"""A text is an outlier only if its mean similarity is at least this far below the median."""

MIN_CENTRED_DISTANCE = 0.1
"""The same, for similarities after the mean of the background is subtracted. `make eval-real` shows
how many strays and how many good texts both rules find."""


@dataclass(frozen=True, slots=True)
class DroppedText:
    """A text that was left out.

    Attributes:
        text: The text.
        votes: Number of answers that contain it.
        reason: Why it was left out.
    """

    text: str
    votes: int
    reason: str


@dataclass(frozen=True, slots=True)
class GeneratedTexts:
    """The texts that a language model gave for a criterion.

    Attributes:
        criterion: Normalised name of the criterion.
        texts: Kept texts by descending votes; texts of `GenerationOptions.include` come first.
        dropped: Texts that were left out, by descending votes.
        answers: Number of answers that the model gave.
        provenance: JSON values that say how the texts were made.
    """

    criterion: str
    texts: tuple[RankedText, ...]
    dropped: tuple[DroppedText, ...]
    answers: int
    provenance: dict[str, Any]

    @property
    def unsure(self) -> bool:
        """Whether the language model hardly knows the criterion, see `reasons`."""
        return bool(self.reasons)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons why the model hardly knows the criterion; empty if it does."""
        found = []
        sure = self.provenance.get("sure_share", SURE) * self.answers
        if self.provenance.get("form") != "list" and all(each.votes < sure for each in self.texts):
            found.append("no text is in a quarter of its answers")
        if self.provenance.get("mean_relevance", MIN_RELEVANCE) < MIN_RELEVANCE:
            found.append("it does not find its own texts likely for this criterion")
        return tuple(found)

    def doubts(self) -> str:
        """Return what the model is unsure of and what it said, with advice."""
        said = ", ".join(f"{each.text} ({each.votes})" for each in self.texts[:12])
        return (
            f"{self.provenance['model']['name']} does not seem to know {self.criterion!r}: "
            f"{', and '.join(self.reasons)}. In {self.answers} answers it said: {said}. Try other "
            "words, a hint or an example line, a larger model, or texts of your own"
        )


def generate_texts(
    criterion: str,
    llm: LanguageModel | str | os.PathLike[str] | None = None,
    options: GenerationOptions = DEFAULT_OPTIONS,
    *,
    embed_text: EmbedText | None = None,
    background: NDArray[np.floating] | None = None,
    prompts: Sequence[str] = (DEFAULT_PROMPT,),
    pictures: NDArray[np.floating] | None = None,
    progress: ReportProgress | None = None,
) -> GeneratedTexts:
    """Ask a language model for the texts of a criterion, and keep those its answers agree on.

    Args:
        criterion: The criterion in words.
        llm: An open language model, a GGUF file, `hf:OWNER/REPO/FILE.gguf`, or None for the
            default model.
        options: How often and how to ask.
        embed_text: Text tower of the vision-language model, used to drop outliers. None keeps
            them.
        background: Embeddings of generic texts, shape (n, d), such as `ModelBundle.background`.
            With them, outliers are found far more reliably.
        prompts: Prompts that the texts will be embedded with.
        pictures: Universal embeddings of pictures of the user, shape (n, d), unit rows. Texts that
            fit none of them best are dropped, and the others are ranked by how much they spread.
            Needs `embed_text`.
        progress: Called after each token.

    Returns:
        The texts, with their votes.

    Raises:
        CriterionError: If the criterion is malformed.
        InvalidInputError: If a prompt is malformed, or there are too few pictures.
        GenerationError: If the model cannot be loaded or fails, or if it does not know the
            criterion: fewer than `MIN_TEXTS` texts are left, no text is in a quarter of the
            answers, or the criterion does not make the texts likely.
        MissingDependencyError: If neither llama-cpp-python nor xllamacpp is installed.
    """
    name, prompts = normalise_criterion(criterion), check_prompts(prompts)
    with _open_llm(llm) as opened:
        answers = ask(name, opened, options, progress)
        model_name, description = opened.name, opened.describe()
        trust = _Trust(answers, options)
        candidates, dropped = _without_echoes(name, answers, options)
        relevant = _relevance(opened, name, [each for each in candidates if trust.may_keep(each)])
    texts, untrusted = trust.split(candidates, relevant)
    dropped = [*dropped, *untrusted]
    if len(texts) < MIN_TEXTS:
        said = ", ".join(f"{c.text} ({c.votes})" for c in answers.votes.ranking()[:12]) or "nothing"
        raise GenerationError(
            f"{model_name} does not seem to know {name!r}: {len(texts)} texts of its "
            f"{len(answers.seeds)} answers can be trusted, {MIN_TEXTS} are needed. It said: "
            f"{said}. Try a hint or an example line, a larger model, or texts of your own"
        )
    mean = _mean_relevance(texts, relevant)
    near: dict[str, float] = {}
    voted: dict[str, Any] = {}
    if embed_text is not None:
        rows = embed_with_prompts([c.text for c in texts], prompts, embed_text)
        if options.spread > 0:
            near = _similarities(texts, rows, background)
            distance = MIN_DISTANCE if background is None else MIN_CENTRED_DISTANCE
            stays, outliers = _find_outliers(texts, near, trust, options.spread, distance)
            dropped = [*dropped, *outliers]
            texts, rows = [texts[i] for i in stays], rows[stays]
        if pictures is not None:
            votes = vote(rows, pictures, background)
            texts, unfit, voted = _drop_unfit(texts, votes, options)
            dropped = [*dropped, *unfit]
    kept, rest = texts[: options.count], texts[options.count :]
    dropped = [*dropped, *(DroppedText(c.text, c.votes, "over the number asked for") for c in rest)]
    found = GeneratedTexts(
        criterion=name,
        texts=tuple(kept),
        dropped=tuple(sorted(dropped, key=lambda d: -d.votes)),
        answers=len(answers.seeds),
        provenance={
            "texts": "generated",
            "model": description,
            **describe(answers),
            "sure_share": round(trust.sure_share, 3),
            "options": {k: v for k, v in asdict(options).items() if k != "form"},
            "votes": {c.text: c.votes for c in kept},
            **_describe_relevance(kept, relevant, mean),
            "similarity": {c.text: round(near[c.text], 3) for c in kept if c.text in near},
            **voted,
            "dropped": [asdict(d) for d in dropped],
        },
    )
    if found.unsure and not options.accept_unsure:
        raise GenerationError(found.doubts())
    return found


@contextmanager
def _open_llm(llm: LanguageModel | str | os.PathLike[str] | None) -> Iterator[LanguageModel]:
    """Yield an open language model; a model that is opened here is also closed here."""
    if llm is None or isinstance(llm, str | os.PathLike):
        with LanguageModel.open(llm) as opened:
            yield opened
    else:
        yield llm


def _without_echoes(
    criterion: str, answers: Answers, options: GenerationOptions
) -> tuple[list[RankedText], list[DroppedText]]:
    """Drop excluded texts and echoes of the criterion; put included texts first."""
    own = set(text_key(criterion).split())
    votes = answers.votes.votes
    included, excluded = ({text_key(t) for t in ts} for ts in (options.include, options.exclude))
    kept = [RankedText(text, votes.get(text_key(text), 0)) for text in options.include]
    dropped = []
    for candidate in answers.votes.ranking():
        key = text_key(candidate.text)
        if key in included:
            continue
        if key in excluded:
            dropped.append(DroppedText(candidate.text, candidate.votes, "excluded by the user"))
        elif set(key.split()) <= own:
            dropped.append(DroppedText(candidate.text, candidate.votes, "echoes the criterion"))
        else:
            kept.append(candidate)
    return kept, dropped


class _Trust:
    """Decides which texts to trust, by their votes and their relevance.

    The thresholds are shares of the answers, so that more answers never give a worse list. They are
    lower where the model has more values to name than fit into its answers. `python -m
    crl_benchmarks.coverage` shows what they find.
    """

    def __init__(self, answers: Answers, options: GenerationOptions) -> None:
        self._votes, self._is_list = answers.votes, answers.form == "list"
        self._included = set(options.include)
        shares = sorted((self._share(each) for each in self._votes.ranking()), reverse=True)
        typical = float(np.mean(shares[:TYPICAL_TEXTS])) if shares else 0.0
        self._scale = min(1.0, TYPICAL * typical / LIKELY)

    @property
    def sure_share(self) -> float:
        """Share of the answers from which a text is sure."""
        return SURE * self._scale

    def is_sure(self, candidate: RankedText) -> bool:
        """Return whether a text is kept whatever else is known about it."""
        return candidate.text in self._included or self._is_voted(candidate, SURE)

    def may_keep(self, candidate: RankedText) -> bool:
        """Return whether the votes of a text are enough, if it is relevant."""
        return self._is_list or self.is_sure(candidate) or self._is_voted(candidate, LIKELY)

    def split(
        self, candidates: Sequence[RankedText], relevant: Mapping[str, float]
    ) -> tuple[list[RankedText], list[DroppedText]]:
        """Return the texts to keep, and the others.

        Args:
            candidates: The texts.
            relevant: Relevance of those that `may_keep` lets pass; empty if the model cannot tell.
        """
        kept, dropped = [], []
        for each in candidates:
            if reason := self._objection(each, relevant.get(each.text)):
                dropped.append(DroppedText(each.text, each.votes, reason))
            else:
                kept.append(each)
        return kept, dropped

    def _objection(self, candidate: RankedText, relevance: float | None) -> str:
        """Return why a text is not trusted; empty if it is."""
        if self.is_sure(candidate):
            return ""
        few = f"in {candidate.votes} of {self._votes.chances(candidate.text)} answers only"
        if not self.may_keep(candidate):
            return few
        if relevance is None:
            return "" if self._is_list or self._is_voted(candidate, 2 * LIKELY) else few
        share = self._share(candidate) / max(self._scale, 1e-9)
        needed = 0.0 if self._is_list else max(RELEVANT * (1 - share / SURE), 0.0)
        if relevance >= needed:
            return ""
        return (
            f"in {candidate.votes} answers, and the criterion makes it too little more likely: "
            f"log ratio {relevance:.1f}, needed {needed:.1f}"
        )

    def _is_voted(self, candidate: RankedText, share: float) -> bool:
        if self._is_list:
            return False
        return candidate.votes >= 2 and self._share(candidate) >= share * self._scale

    def _share(self, candidate: RankedText) -> float:
        return candidate.votes / max(self._votes.chances(candidate.text), 1)


def _relevance(llm: LanguageModel, criterion: str, texts: Sequence[RankedText]) -> dict[str, float]:
    """Return the relevance of each text; nothing if the model cannot tell."""
    if not llm.tells_likelihoods:
        return {}
    values = relevance(llm, criterion, [each.text for each in texts])
    return {each.text: float(value) for each, value in zip(texts, values, strict=True)}


def _mean_relevance(texts: Sequence[RankedText], relevant: Mapping[str, float]) -> float | None:
    """Return the mean relevance of texts, weighted by votes; None if it is not known."""
    if not relevant:
        return None
    weights = [max(each.votes, 1) for each in texts]
    return float(np.average([relevant[each.text] for each in texts], weights=weights))


def _describe_relevance(
    texts: Sequence[RankedText], relevant: Mapping[str, float], mean: float | None
) -> dict[str, Any]:
    """Return what a basis records about the relevance of its texts."""
    if mean is None:
        return {}
    return {
        "relevance": {each.text: round(relevant[each.text], 2) for each in texts},
        "mean_relevance": round(mean, 2),
    }


def _similarities(
    texts: Sequence[RankedText], rows: NDArray[np.float32], background: NDArray[np.floating] | None
) -> dict[str, float]:
    """Return the mean similarity of each text to the others, weighted by their votes."""
    weights = np.array([max(c.votes, 1) for c in texts], np.float32)
    near = similarity_to_others(rows, weights, background)
    return {each.text: float(value) for each, value in zip(texts, near, strict=True)}


def _find_outliers(
    texts: Sequence[RankedText],
    near: Mapping[str, float],
    trust: _Trust,
    spread: float,
    distance: float,
) -> tuple[list[int], list[DroppedText]]:
    """Return the positions of the texts near the others, and the texts far from them.

    A text with many votes stays, because the vision-language model may know it better than the
    others.
    """
    cut = outlier_cut(np.array([near[each.text] for each in texts]), spread, distance)
    kept = [i for i, each in enumerate(texts) if near[each.text] >= cut or trust.is_sure(each)]
    stays = set(kept)
    outliers = [
        DroppedText(
            each.text, each.votes,
            f"far from the others: similarity {near[each.text]:.3f}, cut {cut:.3f}",
        )
        for i, each in enumerate(texts)
        if i not in stays
    ]  # fmt: skip
    return kept, outliers


def _drop_unfit(
    texts: Sequence[RankedText], votes: PictureVotes, options: GenerationOptions
) -> tuple[list[RankedText], list[DroppedText], dict[str, Any]]:
    """Drop texts that fit none of the pictures best, and rank the others by their spread.

    Returns:
        The kept and the dropped texts, and what a basis records about the votes.
    """
    included = set(options.include)
    order = sorted(
        range(len(texts)),
        key=lambda i: (texts[i].text not in included, -votes.spread[i]),
    )
    kept = [texts[i] for i in order if votes.fires[i] or texts[i].text in included]
    unfit = [
        DroppedText(texts[i].text, texts[i].votes, NEVER_FIRES.format(votes.share[i] * 100))
        for i in order
        if not votes.fires[i] and texts[i].text not in included
    ]
    names = [each.text for each in kept]
    return kept, unfit, {"pictures": describe_votes(votes, [each.text for each in texts], names)}


def outlier_cut(near: NDArray[np.floating], spread: float, distance: float) -> float:
    """Return the similarity below which a text is an outlier.

    Args:
        near: Result of `similarity_to_others`, shape (n,).
        spread: Number of robust standard deviations that an outlier is below the median.
        distance: Smallest distance of an outlier from the median.
    """
    median = float(np.median(near))
    deviation = 1.4826 * float(np.median(np.abs(near - median)))
    return median - max(spread * deviation, distance)


def similarity_to_others(
    rows: NDArray[np.float32],
    weights: NDArray[np.float32],
    background: NDArray[np.floating] | None = None,
) -> NDArray[np.float32]:
    """Return the weighted mean cosine of each row with all other rows.

    All texts share a direction, which makes even unrelated ones similar. It is the mean of the
    background, and is subtracted first.

    Args:
        rows: Unit rows, shape (n, d), float32.
        weights: Positive weights of the rows, shape (n,), float32.
        background: Embeddings of generic texts, shape (b, d), unit rows.

    Returns:
        Mean cosines, shape (n,), float32; zeros if there is one row.
    """
    if background is not None:
        rows = normalise_rows(rows - background.mean(axis=0, dtype=np.float32), "l2")
    total = (weights[:, None] * rows).sum(axis=0)
    others = total[None, :] - weights[:, None] * rows
    mass = np.maximum(weights.sum() - weights, 1e-12)
    return np.asarray((others * rows).sum(axis=1) / mass, np.float32)
