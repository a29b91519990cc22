"""Makes small tokenizers of the kinds that the models of Hugging Face have, with fixed contents."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import transformers
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from crl_export.background import generic_texts
from crl_sdk.model._parity import TEXTS

_OTHERS = (
    "日本の庭園 山と川", "一只猫坐在红色的沙发上", "사과와 배",
    "ein Haus mit blauer Tür und großem Garten",
    "une école près de la forêt", "красная машина у дома", "μια γάτα στον κήπο",
    "قطة على السجادة", "½ \ufb01ne ① \uff21\uff14 ™ “quoted” naïve café",
    "wait ... and … then .. > < & @ / \\ ... ... ...",
)  # fmt: skip
"""Texts in other scripts and with characters that NFKC changes."""


def corpus() -> list[str]:
    """Return texts to train vocabularies with."""
    words = sorted(token.removesuffix("</w>") for token in SimpleTokenizer().encoder)
    plain = [word for word in words if word.isascii() and word.isalpha() and len(word) > 3]
    phrases = [" ".join(plain[at : at + 8]) for at in range(0, 6000, 8)]
    return [*generic_texts(), *TEXTS, *phrases, *_OTHERS * 5]


def clip(folder: Path) -> None:
    """CLIP's own, the BPE of OpenAI."""
    simple = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): at for token, at in simple.encoder.items()}
    merges = [" ".join(pair) for pair in simple.bpe_ranks]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    ).save_pretrained(folder)


def bert(folder: Path, *, extra: tuple[str, ...] = ()) -> int:
    """WordPiece as `vocab.txt` alone, which older repositories have; return its size."""
    texts = " ".join(corpus())
    characters = sorted({c for c in texts + texts.lower() if not c.isspace()})
    words = sorted({w for w in texts.lower().split() if w.isalpha() and w.isascii()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    tokens += ["##" + c for c in characters] + [w for w in words[::2] if len(w) > 1]
    tokens += ["##ing", "##ed", "##er", "##es", *extra]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens)


def bert_configured(folder: Path, length: int, **settings: object) -> None:
    """The `tokenizer_config.json` of a BERT tokenizer."""
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": length, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def unigram(path: Path, size: int, **ids: int) -> None:
    """A sentencepiece model as those of T5 and XLM-R."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=size, num_threads=1,
        model_type="unigram", normalization_rule_name="nmt_nfkc", minloglevel=2,
        character_coverage=1.0, **ids,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def xlm_roberta(folder: Path, length: int) -> int:
    """The tokenizer of XLM-R as `sentencepiece.bpe.model`; return its size."""
    unigram(folder / "sentencepiece.bpe.model", 1500)
    config = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(transformers.AutoTokenizer.from_pretrained(folder))


def siglip(folder: Path) -> int:
    """The tokenizer of SigLIP 1 as `spiece.model`, as google's repositories have it."""
    unigram(folder / "spiece.model", 1500, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    config = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 64, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return 1500


def gemma(folder: Path) -> int:
    """The tokenizer of SigLIP 2 as `tokenizer.json`: a BPE that falls back to bytes."""
    fast = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), behavior="isolated")
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{n:02X}>" for n in range(256))]
    fast.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=1500, special_tokens=names, show_progress=False)
    )
    content = json.loads(fast.to_str())
    content["added_tokens"] = content["added_tokens"][:5]
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
        "invert": False,
    }  # fmt: skip
    eos = {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<eos>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<eos>": eos},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    config = {
        "tokenizer_class": "GemmaTokenizer", "model_max_length": 1000000000000000019884624838656,
        "add_bos_token": False, "add_eos_token": True, "bos_token": "<bos>", "eos_token": "<eos>",
        "pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "right",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(content["model"]["vocab"])
