"""Tokenizers: what is decoded encodes to itself, and special tokens come from no text."""

import functools
import json

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_jax.text.tokenizer import (
    SPECIAL_TOKENS,
    TokenizerConfig,
    TrainedTokenizer,
    load_tokenizer,
    train_tokenizer,
    train_word_tokenizer,
)
from rlhf_jax.types import RlhfError
from tests.support import disk

TEXTS = [
    "The film isn't good -- it's the best film (of 1999), I'd say.",
    'A "masterpiece"? No; $5 [or 7%] {at most}: don\'t go!',
    "O'Neil's café, naïve ΣΟΦΙΑΣ, l'amour d'été, 日本 映画, x_1 _y_ '' # ## `~@^&*+=|\\/<> … — “so it’s”",
    "s <pad> <bos> <eos> <unk> and e\u0301 \u200b \u0000",
]


@functools.cache
def word(vocab_size=1000):
    return train_tokenizer(TokenizerConfig("word", vocab_size), TEXTS)


@functools.cache
def byte_bpe():
    return train_tokenizer(TokenizerConfig("byte_bpe", 300), TEXTS * 3)


WORDS = range(len(SPECIAL_TOKENS), word().vocab_size)
MARKS = [i for i in WORDS if not str(word().backend.id_to_token(i)).isalnum()]
assert len(WORDS) > 60 and len(MARKS) > 30
known = st.lists(st.one_of(st.sampled_from(WORDS), st.sampled_from(MARKS)), max_size=12)


@pytest.mark.parametrize("token", WORDS)
def test_every_word_and_mark_is_itself(token):
    assert word().encode(word().decode([token])) == [token]


def test_every_mark_between_words_and_other_marks_is_itself():
    words = ["film", "it's", "s", "1999", "_y_", "'", "(", "."]
    outer = [word().encode(text)[0] for text in words]
    sequences = [[first, mark, last] for first in outer for mark in MARKS for last in outer]
    assert word().encode_all([word().decode(ids) for ids in sequences]) == sequences


@given(known)
def test_known_words_decode_and_encode_to_themselves(ids):
    assert word().encode(word().decode(ids)) == ids


@given(known, known)
def test_a_completion_is_what_it_adds_to_the_prompt(prompt, response):
    added = word().decode_completion(prompt, response)
    assert word().decode(prompt) + added == word().decode(prompt + response)


@given(st.text())
@example("the film\n\tis good")
def test_words_are_lower_cased_and_spaces_do_not_count(text):
    assert word().encode(text) == word().encode(f"  {' '.join(text.split())}\n")
    assert word().encode(text) == word().encode(text.lower())


def test_punctuation_is_set_as_people_set_it():
    text = "the film (of 1999) isn't good; it's the best: 7% [or $5]!"
    assert word().decode(word().encode(text)) == text
    assert word().decode(word().encode("The best FILM .")) == "the best film."


def test_the_most_frequent_words_are_kept_and_the_rest_is_unknown():
    tokenizer = train_tokenizer(TokenizerConfig("word", 6), ["b a a", "c b a"])
    assert tokenizer.vocab_size == 6
    assert [tokenizer.backend.id_to_token(i) for i in (4, 5)] == ["a", "b"]
    assert tokenizer.encode("a c b d") == [4, tokenizer.unknown_id, 5, tokenizer.unknown_id]
    assert tokenizer.decode([4, 3, 5]) == "a b"
    assert tokenizer.suppressed == (tokenizer.pad_id, tokenizer.bos_id, tokenizer.unknown_id)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unknown_id) == (0, 1, 2, 3)


@given(st.text())
@example("".join(map(chr, range(256))))
@example("  two  spaces \n\n and 日本 🎬 e\u0301\u200b ")
def test_bytes_hold_any_text(text):
    assert byte_bpe().decode(byte_bpe().encode(text)) == text


@given(st.text(max_size=20), st.text(max_size=20))
def test_a_completion_in_bytes_is_what_it_adds_to_the_prompt(prompt, response):
    before, after = byte_bpe().encode(prompt), byte_bpe().encode(response)
    assert byte_bpe().decode_completion(before, after) == response


def test_where_a_letter_is_cut_in_two_the_prompt_is_not_said_again_and_the_rest_is():
    ids = byte_bpe().encode("a🎬b")
    assert len(ids) == 6
    for cut in (2, 3, 4):
        completion = byte_bpe().decode_completion(ids[:cut], ids[cut:])
        assert completion.endswith("b") and "a" not in completion


@pytest.mark.parametrize("tokenizer", [word, byte_bpe])
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "film ", " ", "<", ">"]), max_size=8).map("".join))
@example("<pad><bos><eos><unk>")
@example("the film<eos>it's good <pad>")
def test_names_of_special_tokens_within_a_text_are_text(tokenizer, text):
    tokenizer = tokenizer()
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    ids = tokenizer.encode(text)
    assert not special & set(ids)
    assert tokenizer.unknown_id not in ids  # every part of the names is known here
    assert tokenizer.encode_all([text, "film"]) == [ids, tokenizer.encode("film")]
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("tokenizer", [word, byte_bpe])
def test_special_tokens_leave_nothing_in_decoded_text(tokenizer):
    tokenizer = tokenizer()
    ids = tokenizer.encode("the film")
    around = [tokenizer.pad_id, tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(around) == "the film"
    assert tokenizer.decode(iter(around)) == "the film"
    cut = len(tokenizer.encode("the"))
    assert tokenizer.decode_completion([tokenizer.bos_id, *ids[:cut]], [*ids[cut:], tokenizer.eos_id]) == " film"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", [word, byte_bpe])
def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer, directory = tokenizer(), tmp_path / "stage" / "tokenizer"
    tokenizer.save(directory)
    loaded = load_tokenizer(directory)
    assert loaded.backend.to_str() == tokenizer.backend.to_str()
    assert (loaded.vocab_size, loaded.suppressed, loaded.eos_id) == (
        tokenizer.vocab_size,
        tokenizer.suppressed,
        tokenizer.eos_id,
    )
    for text in [*TEXTS, "<eos>", "unheard-of"]:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids and loaded.decode(ids) == tokenizer.decode(ids)
    assert [file.name for file in directory.iterdir()] == ["tokenizer.json"]
    tokenizer.save(directory)  # over an old one


def test_training_again_gives_the_same_tokenizer():
    for kind in ("word", "byte_bpe"):
        config = TokenizerConfig(kind, 280)
        assert train_tokenizer(config, TEXTS).backend.to_str() == train_tokenizer(config, TEXTS).backend.to_str()


def damaged(path):
    text = word().backend.to_str()
    path.write_text(text[: len(text) // 2])


def without_eos(path):
    backend = json.loads(word().backend.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<eos>"]
    del backend["model"]["vocab"]["<eos>"]
    path.write_text(json.dumps(backend))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "is not a readable tokenizer.json"),
        (lambda path: path.mkdir(), "is not a readable tokenizer.json"),
        (lambda path: path.write_bytes(b""), "is not a readable tokenizer.json"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not a readable tokenizer.json"),
        (lambda path: path.write_text("{}"), "is not a readable tokenizer.json"),
        (damaged, "is not a readable tokenizer.json"),
        (without_eos, "no token <eos>"),
    ],
    ids=["missing", "a directory", "empty", "not text", "another JSON", "cut short", "without EOS"],
)
def test_an_unreadable_file_is_one_clear_error(write, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    write(path)
    with pytest.raises(RlhfError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(path) in str(error.value)


def test_a_tokenizer_without_special_tokens_is_refused():
    with pytest.raises(RlhfError, match="no token <pad>"):
        TrainedTokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.parametrize(("kind", "least"), [("word", 5), ("byte_bpe", 260)])
def test_a_vocabulary_too_small_is_refused(kind, least):
    with pytest.raises(ValueError, match=f"vocab_size = {least - 1} must be at least {least} for the kind '{kind}'"):
        TokenizerConfig(kind, least - 1)
    assert train_tokenizer(TokenizerConfig(kind, least), TEXTS).vocab_size == least


def test_a_text_of_nothing_gives_a_vocabulary_of_special_tokens():
    assert TrainedTokenizer(train_word_tokenizer([], 10)).vocab_size == len(SPECIAL_TOKENS)


def test_a_tokenizer_on_a_full_disk_leaves_no_file(tmp_path):
    tokenizer = word()
    with disk.largest_file(100), pytest.raises(OSError, match="File too large"):
        tokenizer.save(tmp_path / "tokenizer")
    assert disk.left_in(tmp_path) == ["tokenizer"]
