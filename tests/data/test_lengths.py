"""Lengths of a split's rows, and what of them is cut."""

import numpy as np
import pytest

from rlhf_jax.data import lengths, pipeline
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer

WORDS = ["good", "bad", "film"]
TOKENIZER = train_tokenizer(TokenizerConfig("word", 16), [" ".join(WORDS)])


def config(prompt: int, response: int) -> pipeline.DataConfig:
    return pipeline.DataConfig(
        train="",
        eval="",
        test=None,
        limit=None,
        text_prompt_tokens=(1, 2),
        max_prompt_tokens=prompt,
        max_response_tokens=response,
    )


def words(count: int) -> str:
    return " ".join(WORDS[i % 3] for i in range(count))


PAIRS = [
    {"prompt": words(n), "chosen": f" {words(2 * n)}", "rejected": f" {words(20 if n == 10 else 1)}"}
    for n in range(1, 11)
]
BOS = len(TOKENIZER.begin([]))


def test_lengths_and_what_is_cut_are_those_of_the_arrays():
    limits = config(8, 12)
    prompt, chosen, rejected = lengths.answer_lengths(lengths.answer_pairs(PAIRS), TOKENIZER, limits)
    # BOS and ten words at most; two words for each of the prompt's, and EOS; one word, or twenty, and EOS.
    assert (prompt["column"], prompt["rows"], prompt["longest"], prompt["limit"]) == ("prompt", 10, BOS + 10, 8)
    assert prompt["cut"] == pytest.approx((10 - (8 - BOS)) / 10)
    assert (chosen["median"], chosen["95 %"], chosen["longest"]) == (13, 21, 21) and chosen["cut"] == 0.5
    assert (rejected["median"], rejected["longest"], rejected["cut"]) == (2, 21, 0.1)

    pairs = pipeline.preferences(PAIRS, TOKENIZER, limits)
    for figure, side in zip((chosen, rejected), pairs, strict=True):
        whole = side.responses.values[side.responses.ends - 1] == TOKENIZER.eos_id
        assert np.mean(~whole) == figure["cut"], "an answer that is cut has no EOS"


def test_a_warning_names_the_field_the_share_and_what_would_do():
    limits = config(8, 12)
    splits = {"train": lengths.answer_lengths(lengths.answer_pairs(PAIRS), TOKENIZER, limits)}
    (prompt_lengths, answer_lengths) = lengths.warnings(splits)
    share = f"{(10 - (8 - BOS)) / 10:.0%}"
    assert (
        prompt_lengths
        == f"data.max_prompt_tokens cuts {share} of prompt (train): raise it by {BOS + 2} to cut 5 % or less."
    )
    assert answer_lengths.startswith(
        "data.max_response_tokens cuts 50% of chosen (train), 10% of rejected (train): raise it by 9"
    )
    raised = {"train": lengths.answer_lengths(lengths.answer_pairs(PAIRS), TOKENIZER, config(10 + BOS, 21))}
    assert lengths.warnings(raised) == []


def test_plain_texts_have_the_room_of_prompt_and_answer():
    texts = [{"text": words(n)} for n in (3, 30)]
    (figure,) = lengths.answer_lengths(lengths.answer_pairs(texts), TOKENIZER, config(8, 12))
    assert (figure["column"], figure["limit"], figure["longest"], figure["cut"]) == ("text", 20, BOS + 31, 0.5)
    assert lengths.prompt_lengths(texts, TOKENIZER, config(8, 12)) == [], "beginnings are as long as the config says"


def test_prompts_alone():
    (figure,) = lengths.prompt_lengths(PAIRS, TOKENIZER, config(8, 12))
    assert (figure["column"], figure["rows"], figure["longest"]) == ("prompt", 10, BOS + 10)


def test_ranked_rows_and_tables_that_are_too_long_to_be_measured_whole(monkeypatch):
    monkeypatch.setattr(lengths, "MOST_ROWS", 4)
    rows = [{"prompt": "good", "completions": [" good", " bad film"]} for _ in range(10)]
    _, answers = lengths.answer_lengths(lengths.answer_pairs(rows), TOKENIZER, config(8, 12))
    assert (answers["column"], answers["rows"], answers["longest"]) == ("completions", 20, 3)


def test_texts_that_give_no_prompt_are_those_that_prompts_leaves_out():
    texts = [{"text": text} for text in ("good", "good bad film", "unknown good bad", "film bad good")]
    limits = config(8, 12)
    kept = pipeline.prompts(texts, TOKENIZER, limits).tokens
    assert lengths.share_without_prompt(texts, TOKENIZER, limits) == 1 - len(kept) / 4 == 0.5
    assert lengths.share_without_prompt(PAIRS, TOKENIZER, limits) == 0
