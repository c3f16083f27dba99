"""Tables to arrays of tokens by hand, on texts of a word or two, and the batches that any step can be asked for."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import pipeline
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.data.ragged import pair_table, sequence_table
from rlhf_jax.stages import kto
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from rlhf_jax.types import RlhfError, TokenBatch

LETTERS = "abcdefgh"
TOKENIZER = train_tokenizer(TokenizerConfig("word", 100), [" ".join(LETTERS), "don don't"])
PAD, BOS, EOS, UNKNOWN = range(4)
A, B, C, D, E, F, G, H = (TOKENIZER.encode(letter)[0] for letter in LETTERS)
assert len({A, B, C, D, E, F, G, H} - {UNKNOWN}) == len(LETTERS)

CONFIG = DataConfig(
    train="train.jsonl",
    eval="eval.jsonl",
    test=None,
    limit=None,
    text_prompt_tokens=(1, 2),
    max_prompt_tokens=3,
    max_response_tokens=4,
)


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def assert_padded(tokens, mask, expected, *, left=False):
    """Rows of tokens, filled up with zeros, and the mask of what is no filling."""
    gaps = [[PAD] * (tokens.shape[1] - len(row)) for row in expected]
    rows = [gap + row if left else row + gap for gap, row in zip(gaps, expected, strict=True)]
    count = np.array([[len(row)] for row in expected])
    places = np.arange(tokens.shape[1])
    masks = places >= tokens.shape[1] - count if left else places < count
    np.testing.assert_array_equal(tokens, rows)
    np.testing.assert_array_equal(mask, masks)
    assert tokens.dtype == np.int32 and mask.dtype == bool


def assert_sequences(batch, prompts, responses):
    """Rows of prompt and response: the whole, where the response starts, and the response."""
    assert_padded(batch.tokens, batch.mask, [p + r for p, r in zip(prompts, responses, strict=True)])
    np.testing.assert_array_equal(batch.start, [len(prompt) for prompt in prompts])
    assert_padded(batch.response, batch.response_mask, responses)


def test_a_plain_text_is_all_trained_but_bos_and_unknown_words():
    batch = pipeline.demonstrations([{"text": "a b x c"}, {"text": ""}, {"text": "X"}], TOKENIZER, CONFIG).all()
    assert_padded(batch.tokens, batch.mask, [[BOS, A, B, UNKNOWN, C, EOS], [BOS, EOS], [BOS, UNKNOWN, EOS]])
    assert batch.tokens.shape == (3, 6)  # the longest
    np.testing.assert_array_equal(np.flatnonzero(batch.loss_mask[0]), [1, 2, 4, 5])
    np.testing.assert_array_equal(np.flatnonzero(batch.loss_mask[1]), [1])
    np.testing.assert_array_equal(np.flatnonzero(batch.loss_mask[2]), [2])
    assert batch.loss_mask.dtype == bool


def test_of_a_prompt_and_its_completion_the_completion_is_trained():
    rows = [
        {"prompt": "a b", "completion": " c d"},
        {"prompt": "a x", "completion": " x"},
        {"prompt": "", "completion": "a"},
        {"prompt": "a", "completion": ""},
    ]
    batch = pipeline.demonstrations(rows, TOKENIZER, CONFIG).all()
    expected = [[BOS, A, B, C, D, EOS], [BOS, A, UNKNOWN, UNKNOWN, EOS], [BOS, A, EOS], [BOS, A, EOS]]
    assert_padded(batch.tokens, batch.mask, expected)
    assert [np.flatnonzero(row).tolist() for row in batch.loss_mask] == [[3, 4, 5], [4], [1, 2], [2]]


def test_of_a_preference_the_chosen_answer_is_the_demonstration():
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c", "text": "h"}]
    batch = pipeline.demonstrations(rows, TOKENIZER, CONFIG).all()
    assert_padded(batch.tokens, batch.mask, [[BOS, A, B, EOS]])
    assert pipeline.training_texts(rows) == ["a b"]
    assert pipeline.training_texts([{"text": "a c"}, {"prompt": "", "completion": "b"}]) == ["a c", "b"]


def test_eos_is_there_unless_the_text_was_cut_off():
    texts = ["a b c d e", "a b c d e f", "a b c d e f g h"]
    batch = pipeline.demonstrations([{"text": text} for text in texts], TOKENIZER, CONFIG).all()
    whole = [BOS, A, B, C, D, E, F]
    assert_padded(batch.tokens, batch.mask, [[*whole[:-1], EOS], whole, whole])

    completions = [" c d e", " c d e f", " c d e f g"]
    rows = [{"prompt": "a b", "completion": completion} for completion in completions]
    batch = pipeline.demonstrations(rows, TOKENIZER, CONFIG).all()
    assert_padded(batch.tokens, batch.mask, [[BOS, A, B, C, D, E, EOS], *[[BOS, A, B, C, D, E, F]] * 2])


@given(st.lists(st.lists(st.sampled_from([*LETTERS, "x"]), max_size=10), min_size=1, max_size=8))
def test_lengths_vary_with_the_texts(texts):
    batch = pipeline.demonstrations([{"text": " ".join(text)} for text in texts], TOKENIZER, CONFIG).all()
    np.testing.assert_array_equal(batch.mask.sum(axis=1), [min(len(text) + 2, 7) for text in texts])
    has_eos = np.any(batch.tokens == EOS, axis=1)
    np.testing.assert_array_equal(has_eos, [len(text) <= 5 for text in texts])
    assert not np.any(batch.loss_mask & ~batch.mask) and not np.any(batch.loss_mask[:, 0])
    assert not np.any(np.isin(batch.tokens, TOKENIZER.suppressed) & batch.loss_mask)


def test_a_word_that_spans_prompt_and_completion_leaves_the_prompt_as_it_is_and_is_told(caplog):
    _, example, _ = pipeline.tokenise(["a", "don", "don"], [" b", "'t a", "'t b"], TOKENIZER, CONFIG)
    (record,) = caplog.records
    assert record.getMessage().startswith("In 2 of 3 rows (the first is row 2) a token would span")
    assert example.prompt == [BOS, *TOKENIZER.encode("don")]
    assert example.response == [*TOKENIZER.encode("'t a"), EOS]
    assert TOKENIZER.encode("don't") != [*TOKENIZER.encode("don"), *TOKENIZER.encode("'t")]


def test_a_byte_tokenizer_keeps_the_space_between_prompt_and_completion():
    tokenizer = train_tokenizer(TokenizerConfig("byte_bpe", 300), ["the film was good"] * 5)
    wide = config(max_prompt_tokens=20, max_response_tokens=20)
    for prompt, completion in (
        ("the film", " was good"),
        ("the film ", "was good"),
        ("the fi", "lm was good"),
        ("", "é"),
    ):
        (example,) = pipeline.tokenise([prompt], [completion], tokenizer, wide)
        assert tokenizer.decode(example.prompt) == prompt
        assert tokenizer.decode_completion(example.prompt, example.response) == completion
        assert example.response[-1] == tokenizer.eos_id


def test_preferences_share_the_prompt_and_are_padded_on_both_sides():
    rows = [
        {"prompt": "a", "chosen": " b c", "rejected": " d"},
        {"prompt": "a b c d", "chosen": " x", "rejected": " a b c d e"},  # the end of a long prompt is kept
    ]
    batch = pair_table(pipeline.preferences(rows, TOKENIZER, CONFIG)).all()
    assert_sequences(batch.chosen, [[BOS, A], [BOS, C, D]], [[B, C, EOS], [UNKNOWN, EOS]])
    assert_sequences(batch.rejected, [[BOS, A], [BOS, C, D]], [[D, EOS], [A, B, C, D]])
    assert batch.chosen.tokens.shape == batch.rejected.tokens.shape == (2, 7)  # one forward pass for both


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_bos_alone_and_gives_a_response_no_more_room(prompt):
    rows = [{"prompt": prompt, "chosen": "a b c d e f g", "rejected": "b"}]
    batch = pair_table(pipeline.preferences(rows, TOKENIZER, CONFIG)).all()
    assert_sequences(batch.chosen, [[BOS]], [[A, B, C, D]])
    assert_sequences(batch.rejected, [[BOS]], [[B, EOS]])
    demonstration = pipeline.demonstrations(rows, TOKENIZER, CONFIG).all()
    assert_padded(demonstration.tokens, demonstration.mask, [[BOS, A, B, C, D]])


def test_prompts_keep_their_end():
    prompts = pipeline.prompts(
        [{"prompt": "a b c"}, {"prompt": "a"}, {"prompt": ""}, {"prompt": "x"}], TOKENIZER, CONFIG
    )
    assert prompts.tokens.shape == (4, 3)
    assert_padded(prompts.tokens, prompts.mask, [[BOS, B, C], [BOS, A], [BOS], [BOS, UNKNOWN]], left=True)


def text_prompts(texts, **changes):
    prompts = pipeline.prompts([{"text": text} for text in texts], TOKENIZER, config(**changes))
    return [tokens[mask].tolist() for tokens, mask in zip(prompts.tokens, prompts.mask, strict=True)]


def test_beginnings_of_texts_are_of_every_allowed_length_and_stay_the_same():
    letters = np.random.default_rng(0).choice(list(LETTERS), (300, 8))
    texts = [" ".join(row) for row in letters]
    found = text_prompts(texts, text_prompt_tokens=(2, 4), max_prompt_tokens=6)
    for text, prompt in zip(texts, found, strict=True):
        assert prompt == [BOS, *TOKENIZER.encode(text)[: len(prompt) - 1]]
    counts = collections.Counter(len(prompt) - 1 for prompt in found)
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 70
    # Fixed by the text alone: by no other row, nor by the process (Python's own hash of a text is).
    assert text_prompts(texts[::-1][:10], text_prompt_tokens=(2, 4), max_prompt_tokens=6) == found[::-1][:10]
    rotated = [" ".join(LETTERS[i:] + LETTERS[:i]) for i in range(8)]
    golden = [2, 4, 4, 2, 4, 3, 2, 3]
    assert [
        len(prompt) - 1 for prompt in text_prompts(rotated, text_prompt_tokens=(2, 4), max_prompt_tokens=6)
    ] == golden


def test_a_beginning_is_known_and_leaves_something_to_say():
    # Too short, as long as the prompt would be, unknown within the beginning, unknown after it.
    texts = ["a", "a b", "x a b c", "a x b c", "a b x c"]
    assert text_prompts(texts, text_prompt_tokens=(2, 2)) == [[BOS, A, B]]


def test_no_prompt_at_all_is_an_error():
    with pytest.raises(RlhfError, match="no row of the data gives a prompt"):
        text_prompts(["a", "x y z"])


def test_rows_without_anything_to_learn_from_are_an_error():
    with pytest.raises(RlhfError, match="row 1 of the data: the columns prompt, id contain no completion"):
        pipeline.demonstrations([{"prompt": "a", "id": 1}], TOKENIZER, CONFIG)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_are_those_of_the_split_up_to_the_limit(tmp_path):
    sources = {
        split: write(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}", "id": i} for i in range(4)])
        for split in ("train", "eval", "test")
    }
    everything = config(**sources)
    for split in sources:
        assert pipeline.load_rows(everything, split) == [{"text": f"{split} {i}", "id": i} for i in range(4)]
    without_test = config(train=sources["train"], eval=sources["eval"], limit=2)
    assert [row["text"] for row in pipeline.load_rows(without_test, "test")] == ["eval 0", "eval 1"]


def test_an_implicit_prompt_is_taken_out_of_both_answers(tmp_path):
    source = write(tmp_path / "pairs.jsonl", [{"chosen": "a b c", "rejected": "a b d", "score": 1}])
    rows = pipeline.load_rows(config(train=source), "train")
    assert rows == [{"prompt": "a b", "chosen": " c", "rejected": " d", "score": 1}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "row 2, column text is null"),
        ({"text": 3}, "row 2, column text is of type int"),
        ({"txt": "a"}, "row 2 has no column text"),
    ],
    ids=str,
)
def test_a_row_that_is_no_text_is_named(tmp_path, row, message):
    source = write(tmp_path / "texts.jsonl", [{"text": "a"}, row])
    with pytest.raises(RlhfError, match=message) as error:
        pipeline.load_rows(config(train=source), "train")
    assert source in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_prompt_tokens": (0, 2)}, r"text_prompt_tokens = \(0, 2\)"),
        ({"text_prompt_tokens": (3, 2)}, r"text_prompt_tokens = \(3, 2\)"),
        ({"text_prompt_tokens": (1, 3)}, "max_prompt_tokens = 3 has no room for BOS and the 3 tokens"),
        ({"max_response_tokens": 0}, "max_response_tokens = 0"),
        ({"limit": 0}, "limit = 0 must be at least 1"),
        ({"limit": -1}, "limit = -1"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def numbered(count):
    rows = np.arange(count, dtype=np.int32)
    return TokenBatch(rows[:, None], np.ones((count, 1), bool), rows % 2 == 0)


def test_take_takes_the_same_rows_of_every_array():
    taken = pipeline.take(numbered(5), np.array([3, 0]))
    assert isinstance(taken, TokenBatch)
    np.testing.assert_array_equal(taken.tokens[:, 0], [3, 0])
    np.testing.assert_array_equal(taken.loss_mask, [False, True])


def test_unpaired_rows_do_not_pass_for_demonstrations(tmp_path):
    path = tmp_path / "unpaired.jsonl"
    path.write_text('{"prompt": "a", "completion": " bad", "label": false}\n')
    rows = pipeline.load_rows(config(train=str(path)), "train")
    for read in (pipeline.training_texts, lambda rows: pipeline.demonstrations(rows, TOKENIZER, CONFIG)):
        with pytest.raises(RlhfError, match=r"row 1 of the data: unpaired rows .*drop the column label"):
            read(rows)


def test_unpaired_rows_keep_their_labels():
    rows = [
        {"prompt": "a", "completion": " b c", "label": True},
        {"prompt": "a b c d", "completion": "", "label": False},
    ]
    sequences, label = kto.labelled(rows, TOKENIZER, CONFIG)
    assert_sequences(sequence_table(sequences).all(), [[BOS, A], [BOS, C, D]], [[B, C, EOS], [EOS]])
    np.testing.assert_array_equal(label, [True, False])


def test_pairs_that_all_prefer_nothing_are_refused(tmp_path):
    same, data = {"prompt": "a", "chosen": "b", "rejected": "b"}, tmp_path / "pairs.jsonl"
    config = dataclasses.replace(CONFIG, train=str(data))
    data.write_text(2 * (json.dumps(same) + "\n"))
    with pytest.raises(RlhfError, match=r"pairs\.jsonl: chosen and rejected are identical in every row"):
        pipeline.load_rows(config, "train")
    data.write_text(json.dumps(same) + "\n" + json.dumps(same | {"rejected": "c"}) + "\n")
    assert len(pipeline.load_rows(config, "train")) == 2
