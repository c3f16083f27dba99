"""Stop strings in tokens: a table finds what the text holds, and where that cannot be known, nothing."""

from collections.abc import Sequence

import numpy as np
import pytest

from rlhf_jax.text.stop_strings import FOUND, cut, stop_table
from rlhf_jax.text.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from tests.support import tokenizer_files

WORDS = "the film was good, it is (of 1999) and the end. a man! the dog?"


def word(directory):
    return train_tokenizer(TokenizerConfig("word", 40), [WORDS] * 3)


def loaded(make):
    return lambda directory: load_tokenizer(make(directory))


def first_stop(tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int], stops: Sequence[str]):
    """Find the end by decoding every prefix of the response."""
    for count in range(1, len(response) + 1):
        text = tokenizer.decode_completion(prompt, response[:count])
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return count, text[: min(places)]
    return len(response), tokenizer.decode_completion(prompt, response).rstrip("\ufffd")


def found_by_table(table: np.ndarray, response: Sequence[int]) -> int | None:
    state = 0
    for place, token in enumerate(response):
        state = table[state, token]
        if state == FOUND:
            return place + 1
    return None


@pytest.mark.parametrize(
    ("make", "certain"), [(loaded(tokenizer_files.gpt2), 1.0), (loaded(tokenizer_files.llama2), 0.6), (word, 0.2)]
)
def test_the_table_finds_stop_strings_where_the_text_has_them(make, certain, tmp_path):
    tokenizer, rng = make(tmp_path), np.random.default_rng(0)
    prompt = tokenizer.encode("the film")
    # A byte of sentencepiece's that is no character makes one of its neighbours none either.
    bytes_alone = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]) == "\ufffd"]
    usable = [token for token in range(tokenizer.vocab_size) if certain == 1 or token not in bytes_alone]
    found, there = 0, 0
    for _ in range(60):
        response = rng.choice(rng.choice(usable, 5), 14).tolist()  # few different ones, so that they come again
        text = tokenizer.decode_completion(prompt, response)
        starts = rng.integers(0, max(len(text) - 4, 1), 2)
        stops = [text[start : start + length] for start, length in zip(starts, rng.integers(1, 5, 2), strict=True)]
        if not all(stops) or "\ufffd" in "".join(stops):
            continue
        count, before = first_stop(tokenizer, prompt, response, stops)
        assert cut(tokenizer, prompt, response, stops) == (count, before)
        table = stop_table(tokenizer, stops, tokenizer.vocab_size + 3)
        assert table.shape[1] == tokenizer.vocab_size + 3
        seen = found_by_table(table, response)
        there, found = there + 1, found + (seen == count)
        assert seen is None or seen >= count  # never what is not there
        assert any(stop in tokenizer.decode_completion(prompt, response[:seen]) for stop in stops) or seen is None
    assert there > 20
    assert found >= certain * there


def test_a_stop_string_may_begin_and_end_within_tokens_and_special_tokens_are_no_text(tmp_path):
    tokenizer = load_tokenizer(tokenizer_files.chatml(tmp_path))
    prompt, response = tokenizer.encode("A:"), tokenizer.encode(" ab日abac the film was good")
    table = stop_table(tokenizer, ["abac", "日x"], tokenizer.vocab_size)
    count = found_by_table(table, response)
    assert count is not None
    assert (count, " ab日") == cut(tokenizer, prompt, response, ["abac", "日x"])
    special = tokenizer.encode("<|im_start|>")
    assert len(special) == 1
    parted = [token for own in response for token in (own, *special)]
    assert found_by_table(table, parted) == 2 * count - 1
    # Beginnings of a stop string that lead nowhere: it is found all the same where it is.
    within = tokenizer.encode(" was goo was good")
    assert found_by_table(stop_table(tokenizer, ["as good"], tokenizer.vocab_size), within) == len(within)


@pytest.mark.parametrize("strings", [[], ["a", ""]])
def test_nothing_is_no_stop_string(strings, tmp_path):
    with pytest.raises(ValueError, match="must be one or more non-empty texts"):
        stop_table(load_tokenizer(tokenizer_files.gpt2(tmp_path)), strings, 320)
