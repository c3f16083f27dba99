"""Text that appears token by token: never half a character, never what a stop string takes back."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from rlhf_jax.text.incremental import IncrementalText, token_texts
from rlhf_jax.text.tokenizer import load_tokenizer
from tests.support.tokenizer_files import chatml, gemma, gpt2, save

TEXT = "Zoë’s 👩‍🚀 said: “naïve — 日本語” (of 1999).\n\n  The end"


def llama2(directory: Path) -> Path:
    """As Llama 2's: sentencepiece's spaces, and bytes, which are not special, for what is unknown."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁", "é"]
    vocabulary = {name: id for id, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(fallback)
    return save(directory, backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def pieces(tokenizer, prompt: str, answer: str, stops: list[str] | None = None) -> tuple[list[str], IncrementalText]:
    before = tokenizer.encode(prompt)
    text = IncrementalText(tokenizer, before, stops or [])
    given = [text.add(token) for token in tokenizer.encode(prompt + answer)[len(before) :]]
    return [*given, text.finish()], text


@pytest.mark.parametrize("make", [gpt2, chatml, gemma, llama2])
def test_pieces_are_characters_and_make_the_whole(make, tmp_path):
    tokenizer = load_tokenizer(make(tmp_path))
    given, text = pieces(tokenizer, "A:", TEXT)
    assert "".join(given) == text.text == TEXT
    assert "\ufffd" not in "".join(given)
    assert any(piece == "" for piece in given)  # of the characters that several tokens make
    assert sum(piece != "" for piece in given) > 20
    assert not text.stopped


@pytest.mark.parametrize("make", [gpt2, chatml, gemma, llama2])
def test_texts_of_tokens_make_up_the_completion(make, tmp_path):
    tokenizer = load_tokenizer(make(tmp_path))
    whole = tokenizer.encode("A:" + TEXT)
    count = len(tokenizer.encode("A:"))
    texts = token_texts(tokenizer, whole[:count], [*whole[count:], tokenizer.eos_id])
    assert len(texts) == len(whole) - count + 1
    assert "".join(texts[:-1]) == tokenizer.decode_completion(whole[:count], whole[count:]) == TEXT
    assert texts[-1] == tokenizer.backend.id_to_token(tokenizer.eos_id) != ""
    assert any(text == "" for text in texts), "a character of several tokens belongs to its last"
    half = token_texts(tokenizer, whole[:count], tokenizer.encode("A: x日")[count:-1])
    assert "".join(half).rstrip("\ufffd") == " x"


@pytest.mark.parametrize("make", [chatml, llama2])
def test_half_a_character_at_the_end_is_left_out(make, tmp_path):
    tokenizer = load_tokenizer(make(tmp_path))
    prompt, whole = tokenizer.encode("A: "), tokenizer.encode("A: x日")
    text = IncrementalText(tokenizer, prompt)
    for token in whole[len(prompt) : -1]:
        text.add(token)
    text.finish()
    assert text.text == "x"


def test_a_stop_string_is_not_given_out_though_it_comes_in_pieces(tmp_path):
    tokenizer = load_tokenizer(chatml(tmp_path))
    given, text = pieces(tokenizer, "A:", " one\nHuman: two", ["\nHuman:", "zzz"])
    assert "".join(given) == text.text == " one"
    assert text.stopped
    # The first stop string that is found ends it, wherever it stands among those that are given.
    assert pieces(tokenizer, "A:", " one two three", ["three", "two"])[1].text == " one "
    # A beginning of one that leads nowhere is given out after all.
    given, text = pieces(tokenizer, "A:", " one\nHumane. one\nHum", ["\nHuman:"])
    assert "".join(given) == " one\nHumane. one\nHum"
    assert not text.stopped
    assert given[-1] == "\nHum"
    # Half a stop string may be its own beginning.
    assert pieces(tokenizer, "A:", " ababac", ["abac"])[1].text == " ab"
