"""The tokenizer of a GGUF file: the same ids as transformers' own conversion gives, where that knows the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

from rlhf_jax.text.gguf_tokenizer import write_tokenizer
from rlhf_jax.types import RlhfError
from tests.support.gguf_files import TEMPLATE

TEXTS = [
    "The film isn't good -- it's the BEST film (of 1999), I'D say: 3.14159!!\n\n\tNo?  \n",
    "  two spaces, O'Neil's café, naïve ΣΟΦΙΑΣ, e\u0301té, 日本 映画 x_1 _y_ '' ½ ٣٤ 🚀😶\u200d🌫️",
    "<s> hello </s> <think> 12345 </think>",
    "",
]
SPLITS = ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "dbrx", "olmo"]
CONTROL, USER_DEFINED, BYTE = 3, 4, 6


def train() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def byte_level(pre: str | None, **changes: Any) -> dict[str, Any]:
    """Metadata of a vocabulary trained on whole texts, so that it matters where they are cut."""
    model = json.loads(train().to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 77,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*words, "<s>", "</s>", "<think>"],
        "tokenizer.ggml.token_type": [1] * len(words) + [CONTROL, CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(words),
        "tokenizer.ggml.eos_token_id": len(words) + 1,
        "tokenizer.chat_template": TEMPLATE,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """Metadata of a vocabulary as SentencePiece's BPE gives: bytes, pieces by falling score, then single letters."""
    pieces = ["▁t", "he", "▁the", "▁f", "il", "▁fil", "▁film", "is", "▁is", "in", "st", "▁▁", "▁BEST"]
    letters = ["▁", *"thefilmsnoBESTdagrcuvw.,'!?():-1234590"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters, "<think>"]
    pieces_start = 259
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * pieces_start + [-float(i) for i in range(len(pieces + letters))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [BYTE] * 256 + [1] * len(pieces + letters) + [USER_DEFINED],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def load(metadata: dict[str, Any], directory: Path) -> Any:
    write_tokenizer(metadata, directory, source=Path("model.gguf"))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(directory)


def theirs(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Convert the tokenizer with transformers."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    renames = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    values = {name: metadata[f"tokenizer.{key}"] for key, name in renames.items() if f"tokenizer.{key}" in metadata}
    return mapping.convert_gguf_tokenizer("llama", values)[0]


@pytest.mark.parametrize("pre", [pre for pre in SPLITS if pre != "smollm"])
def test_byte_pairs_are_those_of_transformers(pre: str, tmp_path: Path):
    metadata = byte_level(pre, add_bos_token=False)
    tokenizer, expected = load(metadata, tmp_path), theirs(metadata)
    for text in TEXTS:
        normalised = tokenizer.backend_tokenizer.normalizer.normalize_str(text) if pre in ("qwen2", "olmo") else text
        assert tokenizer(text)["input_ids"] == expected.encode(normalised).ids, text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == normalised


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_those_of_transformers(prefix: bool, tmp_path: Path):
    metadata = sentencepiece(add_space_prefix=prefix, add_bos_token=False)
    tokenizer, expected = load(metadata, tmp_path), theirs(metadata)
    for text in [text.replace("<", "(") for text in TEXTS if not text.startswith(" ")]:
        ids = tokenizer(text)["input_ids"]
        if prefix:
            assert ids == expected.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_a_space_in_front_only_where_the_file_asks_for_it(tmp_path: Path):
    tokenizer = load(sentencepiece(), tmp_path)
    assert tokenizer.tokenize("the film") == ["▁the", "▁film"]
    tokenizer = load(sentencepiece(add_space_prefix=False), tmp_path)
    assert tokenizer.tokenize("the film") == ["t", "he", "▁film"]


def test_the_best_pieces_are_merged_first(tmp_path: Path):
    metadata = sentencepiece()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    assert load(metadata, tmp_path).tokenize("ist") == ["▁is", "t"]
    scores[tokens.index("st")] = 1.0
    assert load(metadata, tmp_path).tokenize("ist") == ["▁", "i", "st"]


def test_smollm_splits_numbers_into_digits(tmp_path: Path):
    tokens = load(byte_level("smollm"), tmp_path).tokenize("in 1999 and 3.14159")
    assert [token for token in tokens if any(letter.isdigit() for letter in token)] == list(
        "199931 4159".replace(" ", "")
    )


@pytest.mark.parametrize(
    ("pre", "changes", "framed"),
    [
        ("smollm", {}, "{}"),
        ("smollm", {"add_bos_token": True}, "<s>{}"),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, "<s>{}</s>"),
        ("llama-bpe", {}, "<s>{}"),
        ("llama-bpe", {"add_bos_token": False}, "{}"),
    ],
)
def test_what_stands_around_a_text(pre: str, changes: dict[str, Any], framed: str, tmp_path: Path):
    tokenizer = load(byte_level(pre, **changes), tmp_path)
    assert tokenizer.decode(tokenizer("film")["input_ids"]) == framed.format("film")
    assert tokenizer.decode(tokenizer("film", add_special_tokens=False)["input_ids"]) == "film"
    ids = tokenizer("film", "good")["input_ids"]
    assert tokenizer.decode(ids) == framed.format("film") + framed.format("good")


def test_a_sentencepiece_text_begins_with_bos(tmp_path: Path):
    assert load(sentencepiece(), tmp_path)("the")["input_ids"][0] == 1


def test_special_tokens_and_the_chat_template(tmp_path: Path):
    metadata = byte_level("smollm")
    tokenizer = load(metadata, tmp_path)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", None)
    assert len(tokenizer) == len(tokens)
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(len(tokens)))
    assert tokenizer.model_max_length == 77
    ids = tokenizer("<s>a<think>b</s>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "<think>", "b", "</s>"]
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>user: hello</s>\n"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "model.gguf has no tokenizer"),
        (byte_level("smollm", model="t5"), "has a tokenizer of kind 't5': .* must be one of gpt2, llama"),
        (
            byte_level("falcon"),
            "unsupported pre-tokenisation .tokenizer.ggml.pre is 'falcon'.: it must be one of gpt-2, smollm",
        ),
        (byte_level(None), "tokenizer.ggml.pre is None"),
        (byte_level("smollm", eos_token_id=9999), "tokenizer.ggml.eos_token_id is 9999, but there are only"),
        (byte_level("smollm", tokens=["a", "b", "a"]), "the token 'a' twice"),
        (byte_level("smollm", merges=["a b", "ab zz"]), "model.gguf: the merges .*: Token `.*` out of vocabulary"),
        (sentencepiece(scores=[1.0]), "1 scores"),
    ],
)
def test_what_is_wrong_is_named(metadata: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(RlhfError, match=message):
        write_tokenizer(metadata, tmp_path, source=Path("model.gguf"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_words_that_no_merge_leads_to(pre: str, whole: bool, tmp_path: Path):
    metadata = byte_level(pre)
    metadata["tokenizer.ggml.tokens"].append("Ġzyzzyva")
    metadata["tokenizer.ggml.token_type"].append(1)
    assert ("Ġzyzzyva" in load(metadata, tmp_path).tokenize("a zyzzyva")) is whole


def test_added_tokens_within_words(tmp_path: Path):
    tokens = load(sentencepiece(), tmp_path).tokenize("the<think>the</s>")
    assert tokens == ["▁the", "<think>", "▁the", "</s>"]
