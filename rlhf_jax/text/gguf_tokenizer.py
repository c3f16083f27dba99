"""Convert the tokenizer and chat template of a GGUF file to the files that transformers' AutoTokenizer reads.

transformers has its own conversion, but its table lacks "smollm": it splits SmolLM2's numbers as GPT-2 does.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rlhf_jax.types import RlhfError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # llama.cpp's token types
_SPACE = "\u2581"  # SentencePiece's symbol for a space

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Split(NamedTuple):
    """Pre-tokenisation regex of a byte-level BPE tokenizer, with the other settings of the models that use it."""

    pattern: str
    digits: bool = False  # split digits individually before applying the pattern
    nfc: bool = False  # apply NFC normalisation first
    whole_words: bool = False  # use a word in the vocabulary directly, without merges
    bos: bool = False  # prepend BOS unless the file specifies otherwise


_QWEN2 = _Split(_LLAMA3_SPLIT.replace("{1,3}", ""), nfc=True)
_LLAMA3 = _Split(_LLAMA3_SPLIT, whole_words=True, bos=True)
_SPLITS = {
    "gpt-2": _Split(_GPT2_SPLIT),
    "smollm": _Split(_GPT2_SPLIT, digits=True),
    "starcoder": _Split(_GPT2_SPLIT, digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _Split(_LLAMA3_SPLIT),
    "smaug-bpe": _Split(_LLAMA3_SPLIT),
    "tekken": _Split(_TEKKEN_SPLIT, whole_words=True, bos=True),
    "olmo": _Split(_GPT2_SPLIT, nfc=True),  # of GPT-NeoX, Pythia and the first OLMo
}
"""Splits by `tokenizer.ggml.pre`, as in llama.cpp's llama-vocab.cpp."""


def write_tokenizer(metadata: Mapping[str, Any], directory: Path, *, source: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template, if any) from a GGUF file's metadata.

    Args: source is the file, for error messages.
    Raises: RlhfError if there is no tokenizer, or its kind or pre-tokenisation is not supported.
    """
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in _BUILDERS or not tokens:
        found = f"a tokenizer of kind {kind!r}" if tokens else "no tokenizer"
        raise RlhfError(f"{source} has {found}: tokenizer.ggml.model must be one of {', '.join(_BUILDERS)}")
    if len(set(tokens)) != len(tokens):
        duplicate = next(token for token in tokens if tokens.count(token) > 1)
        raise RlhfError(f"{source} has the token {duplicate!r} twice in its vocabulary: use another conversion")
    tokenizer, bos = _BUILDERS[kind](metadata, source)
    special = {f"{name}_token": _special(metadata, name, source) for name in ("bos", "eos", "unk", "pad")}
    _add_tokens(tokenizer, metadata)
    ends = {
        name: metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        for name, default in (("bos", bos), ("eos", False))
    }
    _frame(tokenizer, {name: special[f"{name}_token"] for name, added in ends.items() if added})
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": ends["bos"],
        "add_eos_token": ends["eos"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length", 10**30),
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _byte_level(metadata: Mapping[str, Any], source: Path) -> tuple[Tokenizer, bool]:
    """Build a byte-level BPE tokenizer (GPT-2's kind); also return whether BOS is prepended by default."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        raise RlhfError(
            f"{source} uses an unsupported pre-tokenisation (tokenizer.ggml.pre is {pre!r}): it must be one of "
            f"{', '.join(_SPLITS)}"
        )
    split = _SPLITS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    tokenizer = _tokenizer(metadata, merges, source, ignore_merges=split.whole_words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Digits(individual_digits=True)] if split.digits else []),
            pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.bos


def _sentencepiece(metadata: Mapping[str, Any], source: Path) -> tuple[Tokenizer, bool]:
    """Build a SentencePiece BPE tokenizer, which merges the pair with the highest score first; BOS is the default."""
    unknown = _special(metadata, "unk", source)
    merges = _merges(metadata, source)
    tokenizer = _tokenizer(metadata, merges, source, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer, True


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _tokenizer(metadata: Mapping[str, Any], merges: list[Any], source: Path, **options: Any) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    try:
        return Tokenizer(models.BPE(vocabulary, merges, **options))
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).removeprefix("Error while initializing BPE: ")
        raise RlhfError(f"{source}: the merges do not fit the vocabulary: {reason}") from error


def _merges(metadata: Mapping[str, Any], source: Path) -> list[tuple[str, str]]:
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.scores", [])
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not len(tokens) == len(scores) == len(types):
        raise RlhfError(f"{source} has {len(tokens)} tokens, but {len(scores)} scores and {len(types)} token types")
    rank = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    merges = []
    for token in sorted(rank, key=rank.__getitem__, reverse=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in rank and pair[1] in rank]
        merges += sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]), reverse=True)
    return merges


def _special(metadata: Mapping[str, Any], name: str, source: Path) -> str | None:
    key = f"tokenizer.ggml.{ {'unk': 'unknown', 'pad': 'padding'}.get(name, name) }_token_id"
    index, tokens = metadata.get(key), metadata["tokenizer.ggml.tokens"]
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise RlhfError(f"{source}: {key} is {index}, but there are only {len(tokens)} tokens")
    return tokens[index]


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Add the tokens that are matched in a text before pre-tokenisation; control tokens are skipped when decoding."""
    types = metadata.get("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=False)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _frame(tokenizer: Tokenizer, ends: Mapping[str, str | None]) -> None:
    """Add BOS before and EOS after each text, as far as the file specifies them."""
    present = {name: token for name, token in ends.items() if token is not None}
    if not present:
        return
    before, after = present.get("bos"), present.get("eos")
    pieces = [*([before] if before else []), "{}", *([after] if after else [])]
    single = " ".join(piece.format("$A:0") if piece == "{}" else f"{piece}:0" for piece in pieces)
    second = " ".join(piece.format("$B:1") if piece == "{}" else f"{piece}:1" for piece in pieces)
    ids = [(token, tokenizer.token_to_id(token)) for token in present.values()]
    tokenizer.post_processor = processors.TemplateProcessing(single, f"{single} {second}", ids)
