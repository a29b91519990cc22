"""Writes the tokenizer of SigLIP, which is Python and sentencepiece, for the `tokenizers` library.

Source: `models/siglip/tokenization_siglip.py` of github.com/huggingface/transformers. It splits a
text at special tokens, puts it in lower case, removes ASCII punctuation, and gives the rest to
sentencepiece, which normalises it and takes the most likely pieces.
"""

from __future__ import annotations

import re
import string
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

_SPACE = "▁"
"""What sentencepiece writes for a space."""

_CASED = r"[\p{Ll}\p{Lu}\p{Lt}]"
"""A letter that is small or a capital."""

_START, _MARKS = "\ue000", 0xE001
"""Characters that stand for the start of a text and, from the second on, for special tokens, while
a text is normalised. Unicode leaves them to private use."""


def siglip_as_fast(tokenizer: Any, *, final_sigma: bool) -> Tokenizer:
    """Return a fast tokenizer that adds the end token, and neither pads nor truncates.

    Args:
        tokenizer: SiglipTokenizer of transformers.
        final_sigma: Whether a sigma at the end of a word becomes ς, as Python puts words in lower
            case, or σ. transformers 4 puts characters in lower case one by one.
    """
    sentencepiece = tokenizer.sp_model
    pieces = [
        (sentencepiece.IdToPiece(each), sentencepiece.GetScore(each))
        for each in range(sentencepiece.GetPieceSize())
    ]
    fast = Tokenizer(models.Unigram(pieces, sentencepiece.unk_id(), byte_fallback=False))
    fast.normalizer = normalizers.Sequence(_normalizers(tokenizer, final_sigma))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(each, "isolated") for each in _specials(tokenizer)]
    )
    end = tokenizer.eos_token
    fast.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return fast


def _specials(tokenizer: Any) -> list[str]:
    return sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)


def _normalizers(tokenizer: Any, final_sigma: bool) -> list[Any]:
    marks = {special: chr(_MARKS + at) for at, special in enumerate(_specials(tokenizer))}
    steps: list[Any] = [normalizers.Replace(_SPACE, " "), normalizers.Prepend(_START)]
    steps += [normalizers.Replace(special, mark) for special, mark in marks.items()]
    if tokenizer.do_lower_case:
        if final_sigma:
            steps.append(normalizers.Replace(Regex(f"(?<={_CASED})Σ(?!{_CASED})"), "ς"))
        steps.append(normalizers.Lowercase())
    steps += [
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    steps += [normalizers.Replace(Regex(f" ?{mark} ?"), mark) for mark in marks.values()]
    steps += _sentencepiece_normalizers(tokenizer)
    steps += [
        normalizers.Replace(_START, " "),
        normalizers.Replace(Regex(f" +(?=[{''.join(marks.values())}]|$)"), ""),
        normalizers.Replace(Regex(" {2,}"), " "),
        normalizers.Replace(Regex(f"{marks[tokenizer.eos_token]}$"), ""),
        normalizers.Replace(" ", _SPACE),
    ]
    steps += [normalizers.Replace(mark, special) for special, mark in marks.items()]
    return steps


def _sentencepiece_normalizers(tokenizer: Any) -> list[Any]:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    spec = model.normalizer_spec
    if not spec.precompiled_charsmap:
        return []
    # Precompiled leaves some clusters of several characters as they are
    first = [normalizers.NFKC()] if "nfkc" in spec.name else []
    return [*first, normalizers.Precompiled(spec.precompiled_charsmap)]
