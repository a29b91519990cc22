"""Writes small text towers of M-CLIP and sentence-transformers, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tiny_hugging_face import randomise

TEXTS = [
    "a photo of a cat",
    "ein Foto einer süßen Katze",
    "一张红色圆圈的照片",
    "una foto de un perro",
    "фотография дома",
    "青い四角形",
    "صورة قطة",
]
"""Texts in English, German, Chinese, Spanish, Russian, Japanese and Arabic."""

WIDTH, DIM, POSITIONS = 128, 16, 40
_LAYERS = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_DISTILBERT = {"dim": WIDTH, "hidden_dim": 96, "n_layers": 2, "n_heads": 2}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _known_texts() -> list[str]:
    from crl_export.background import generic_texts

    return [*generic_texts(), *TEXTS * 40]


def word_pieces(folder: Path, **settings) -> int:
    """Write a tokenizer of BERT as its repositories have it; return its vocabulary's size."""
    fast = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=False)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special)
    fast.train_from_iterator(_known_texts(), trainer)
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast.decoder = decoders.WordPiece()
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = fast.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    fast.save(str(folder / "tokenizer.json"))
    kinds = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": None}
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokens = dict(zip(names, special, strict=True))
    write_json(
        folder / "tokenizer_config.json", {**kinds, **tokens, "model_max_length": 512, **settings}
    )
    return len(vocabulary)


def sentence_pieces(folder: Path, **settings) -> int:
    """Write a tokenizer of XLM-R as its repositories have it; return its vocabulary's size."""
    fast = Tokenizer(models.Unigram())
    fast.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(r"  +", " ")])
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=1200, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    fast.train_from_iterator(_known_texts(), trainer)
    fast.add_special_tokens(["<mask>"])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    fast.decoder = decoders.Metaspace()
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    tokens = {
        "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>",
        "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
    }  # fmt: skip
    config = {"tokenizer_class": "XLMRobertaTokenizer", **tokens, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", {**config, **settings})
    return fast.get_vocab_size()


def m_clip(folder: Path, base: str = "xlm-roberta-large"):
    """M-CLIP as its repositories are; return the transformer and the linear layer."""
    if base.startswith("xlm"):
        words = sentence_pieces(folder)
        config = transformers.XLMRobertaConfig(
            vocab_size=words, max_position_embeddings=POSITIONS + 2, type_vocab_size=1,
            layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0, eos_token_id=2, **_LAYERS,
        )  # fmt: skip
        model = transformers.XLMRobertaModel(config)
    else:
        words = word_pieces(folder)
        config = transformers.BertConfig(
            vocab_size=words, max_position_embeddings=POSITIONS, layer_norm_eps=1e-12,
            pad_token_id=0, **_LAYERS,
        )  # fmt: skip
        model = transformers.BertModel(config)
    model = _randomise(model)
    linear = randomise(torch.nn.Linear(WIDTH, DIM))
    weights = {f"transformer.{name}": each for name, each in model.state_dict().items()}
    weights |= {f"LinearTransformation.{name}": each for name, each in linear.state_dict().items()}
    # older versions of transformers saved this buffer
    weights["transformer.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    torch.save(weights, folder / "pytorch_model.bin")
    write_json(
        folder / "config.json",
        {"model_type": "M-CLIP", "modelBase": base, "numDims": DIM, "architectures": ["x"],
         "transformerDimensions": WIDTH, "transformers_version": "4.8.1"},
    )  # fmt: skip
    return model, linear


def _randomise(model):
    """Give a transformer weights with which the embeddings of different texts differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


TRANSFORMERS = {
    "bert": ("BertModel", word_pieces, _LAYERS, 0),
    "distilbert": ("DistilBertModel", word_pieces, _DISTILBERT, 0),
    "mpnet": ("MPNetModel", word_pieces, _LAYERS, 2),
    "roberta": ("RobertaModel", sentence_pieces, _LAYERS, 2),
    "xlm-roberta": ("XLMRobertaModel", sentence_pieces, _LAYERS, 2),
}
"""Class, tokenizer, sizes, and number of positions that no token has, of each `model_type`."""


def sentence_transformer(
    folder: Path,
    kind: str = "distilbert",
    *,
    pooling: str = "mean_tokens",
    activation: str = "torch.nn.modules.linear.Identity",
    normalise: bool = False,
    safetensors: bool = True,
):
    """A directory of sentence-transformers; return the transformer and the linear layer."""
    name, write_tokenizer, sizes, unused = TRANSFORMERS[kind]
    own = "DistilBertTokenizer" if kind == "distilbert" else None
    words = write_tokenizer(folder, **({"tokenizer_class": own} if own else {}))
    config = getattr(transformers, name.replace("Model", "Config"))(
        vocab_size=words,
        pad_token_id=0 if write_tokenizer is word_pieces else 1,
        max_position_embeddings=POSITIONS + unused,
        **sizes,
    )
    model = _randomise(getattr(transformers, name)(config))
    model.save_pretrained(folder)
    linear = randomise(torch.nn.Linear(WIDTH, DIM))
    (folder / "2_Dense").mkdir()
    weights = {f"linear.{name}": each for name, each in linear.state_dict().items()}
    if safetensors:
        from safetensors.torch import save_file

        save_file(weights, folder / "2_Dense" / "model.safetensors")
    else:
        torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    write_json(
        folder / "2_Dense" / "config.json",
        {
            "in_features": WIDTH,
            "out_features": DIM,
            "bias": True,
            "activation_function": activation,
        },
    )
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": WIDTH, **{f"pooling_mode_{m}": m == pooling for m in modes}},
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules += [("3_Normalize", "Normalize")] if normalise else []
    write_modules(folder, modules)
    return model, linear


def write_modules(folder: Path, modules) -> None:
    """Write `modules.json` from the folders and classes of the modules."""
    write_json(
        folder / "modules.json",
        [{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
         for n, (path, kind) in enumerate(modules)],
    )  # fmt: skip
