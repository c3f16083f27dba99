"""Chats to arrays of tokens, by the templates of small checkpoints: what is asked, what is answered, what is learnt."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import chat, pipeline
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.text.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from rlhf_jax.types import RlhfError
from tests.support import tokenizer_files
from tests.support.tokenizer_files import CHATML, LAST_DIFFERS, MARKED, PHI3

CONFIG = DataConfig(
    train="train.jsonl",
    eval="eval.jsonl",
    test=None,
    limit=None,
    text_prompt_tokens=(1, 2),
    max_prompt_tokens=200,
    max_response_tokens=100,
)
OTHER_START = CHATML.replace("<|im_start|>assistant", "<|im_start|>assistant: ")


def say(*contents):
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {
        name: load_tokenizer(write(tmp_path_factory.mktemp(name)))
        for name, write in tokenizer_files.CHECKPOINTS.items()
    }
    for name, template in (("marked", MARKED), ("phi3", PHI3), ("other start", OTHER_START), ("last", LAST_DIFFERS)):
        made[name] = load_tokenizer(tokenizer_files.chatml(tmp_path_factory.mktemp(name), template))
    return made


def shown(tokenizer, tokens, mask):
    """The text of the tokens under a mask, special tokens included."""
    return tokenizer.backend.decode(np.asarray(tokens)[np.asarray(mask)].tolist(), skip_special_tokens=False)


def learnt(tokenizer, rows, **changes):
    """Each row's whole text, and what of it is learnt."""
    batch = pipeline.demonstrations(rows, tokenizer, config(**changes)).all()
    assert not np.any(batch.loss_mask & ~batch.mask)
    return [(shown(tokenizer, *row[:2]), shown(tokenizer, row[0], row[2])) for row in zip(*batch[:3], strict=True)]


FOUR = say("is it good?", "it is", "is it?", "it's the best")
WHOLE = (
    "<|im_start|>user\nis it good?<|im_end|>\n<|im_start|>assistant\nit is<|im_end|>\n"
    "<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\nit's the best<|im_end|>"
)


@pytest.mark.parametrize("name", ["chatml", "marked", "phi3", "gemma"])
def test_the_last_answer_is_learnt_or_all_that_the_assistant_says(tokenizers, name):
    bos = "<bos>" if name == "gemma" else ""
    for row in ({"messages": FOUR}, {"prompt": FOUR[:3], "completion": FOUR[3:]}, {"messages": [*FOUR, *say("bye")]}):
        (completion,) = learnt(tokenizers[name], [row])
        assert completion == (bos + WHOLE, "it's the best<|im_end|>")
        (assistant,) = learnt(tokenizers[name], [row], loss_on="assistant")
        assert assistant == (bos + WHOLE, "it is<|im_end|>it's the best<|im_end|>")


def test_bos_stands_once_where_the_template_writes_it(tokenizers):
    llama2 = tokenizers["llama2"]
    for loss_on in ("completion", "assistant"):
        batch = pipeline.demonstrations([{"messages": FOUR}], llama2, config(loss_on=loss_on)).all()
        ids = batch.tokens[batch.mask].tolist()
        theirs = llama2.wrapped.apply_chat_template(FOUR, tokenize=True, return_dict=True)["input_ids"]
        assert ids == theirs and ids[:2].count(llama2.prefix[0]) == 1
    plain = pipeline.demonstrations([{"prompt": "the film", "completion": " was good"}], llama2, CONFIG).all()
    assert plain.tokens[plain.mask].tolist() == [*llama2.wrapped("the film was good")["input_ids"], llama2.eos_id]


def test_a_template_without_bos_gets_none(tmp_path):
    backend = tokenizer_files.with_bos(tokenizer_files.byte_bpe(["<s>", "<|im_start|>", "<|im_end|>"]), "<s>")
    tokenizer = load_tokenizer(tokenizer_files.save(tmp_path, backend, CHATML, bos_token="<s>", eos_token="<|im_end|>"))
    assert tokenizer.prefix == (0,)
    assert learnt(tokenizer, [{"messages": FOUR}])[0][0] == WHOLE
    assert learnt(tokenizer, [{"text": "film"}])[0] == ("<s>film<|im_end|>", "film<|im_end|>")
    asked = pipeline.prompts([{"messages": FOUR}], tokenizer, config(max_prompt_tokens=10))
    prompt = tokenizer.encode(tokenizer.render(FOUR[:3], add_generation_prompt=True))
    assert asked.tokens.tolist() == [prompt[-10:]]


@pytest.mark.parametrize("name", ["gpt2", "chatml", "llama2"])
def test_eos_is_learnt_though_it_is_the_padding_and_the_unknown_token(tokenizers, name):
    tokenizer = tokenizers[name]
    assert tokenizer.pad_id == tokenizer.eos_id
    rows = [{"prompt": "the film", "completion": " was good"}, {"prompt": "", "completion": "it"}]
    batch = pipeline.demonstrations(rows, tokenizer, CONFIG).all()
    for tokens, mask, loss_mask in zip(*batch[:3], strict=True):
        last = mask.sum() - 1
        assert tokens[last] == tokenizer.eos_id and loss_mask[last] and not loss_mask[0]
        assert (tokens[1 : last + 1] == tokenizer.eos_id).sum() == 1


def test_a_completion_that_ends_by_itself_gets_no_second_eos(tokenizers):
    rows = [{"prompt": "the film", "completion": " was good" + end} for end in ("", "<|endoftext|>")]
    batch = pipeline.demonstrations(rows, tokenizers["gpt2"], CONFIG).all()
    for array in batch[:3]:
        np.testing.assert_array_equal(array[0], array[1])


def test_without_bos_a_plain_text_and_an_empty_prompt_begin_with_one_token(tokenizers):
    gpt2, long = tokenizers["gpt2"], "abcdefgh" * 50
    rows = [{"text": "film"}, {"text": long}]
    batch = pipeline.demonstrations(rows, gpt2, config(max_prompt_tokens=8, max_response_tokens=8)).all()
    assert batch.tokens[0][batch.mask[0]].tolist() == [0, *gpt2.encode("film"), 0]
    assert batch.tokens[1].tolist() == [0, *gpt2.encode(long)[:15]]
    pairs = pipeline.preferences([{"prompt": "", "chosen": "a", "rejected": "b"}], gpt2, CONFIG)
    assert pairs.chosen.prompts.values.tolist() == [0]
    asked = pipeline.prompts([{"prompt": ""}, {"prompt": "film"}], gpt2, CONFIG)
    assert [row[mask].tolist() for row, mask in zip(*asked, strict=True)] == [[0], gpt2.encode("film")]
    begun = pipeline.prompts([{"text": "the film was good"}], gpt2, config(text_prompt_tokens=(2, 2)))
    assert begun.tokens[begun.mask].tolist() == gpt2.encode("the film was good")[:2]


def test_preferences_of_chats_share_the_prompt(tokenizers, tmp_path):
    rows = [{"chosen": FOUR, "rejected": [*FOUR[:3], {"role": "assistant", "content": "no"}]}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    loaded = pipeline.load_rows(config(train=str(tmp_path / "pairs.jsonl")), "train")
    pairs = pipeline.preferences(loaded, tokenizers["chatml"], CONFIG)
    prompt, chosen, rejected = (
        shown(tokenizers["chatml"], rows.values, np.ones(len(rows.values), bool))
        for rows in (pairs.rejected.prompts, pairs.chosen.responses, pairs.rejected.responses)
    )
    assert prompt + chosen == WHOLE
    assert (chosen, rejected) == ("it's the best<|im_end|>", "no<|im_end|>")
    (learned,) = learnt(tokenizers["chatml"], loaded)
    assert learned == (WHOLE, chosen)


def test_prompts_end_where_the_assistant_begins(tokenizers):
    expected = "<|im_start|>user\nis it good?<|im_end|>\n<|im_start|>assistant\n"
    for row in ({"prompt": FOUR[:1]}, {"messages": FOUR[:1]}, {"messages": FOUR[:2]}):
        asked = pipeline.prompts([row], tokenizers["chatml"], CONFIG)
        assert shown(tokenizers["chatml"], asked.tokens, asked.mask) == expected
    asked = pipeline.prompts([{"messages": FOUR[:3]}], tokenizers["chatml"], CONFIG)
    assert shown(tokenizers["chatml"], asked.tokens, asked.mask) == WHOLE.removesuffix("it's the best<|im_end|>")


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


@pytest.mark.parametrize("name", ["chatml", "llama2", "gemma", "phi3"])
@given(chats=st.lists(st.tuples(contents, contents, contents, contents), min_size=1, max_size=4))
def test_what_is_asked_is_how_what_is_learnt_begins(tokenizers, name, chats):
    rows = [{"messages": say(*texts)} for texts in chats]
    asked = pipeline.prompts(rows, tokenizers[name], CONFIG)
    batches = [
        pipeline.demonstrations(rows, tokenizers[name], config(loss_on=on)).all() for on in ("completion", "assistant")
    ]
    for row, messages in enumerate(rows):
        prompt = asked.tokens[row][asked.mask[row]]
        for batch in batches:
            np.testing.assert_array_equal(batch.tokens[row][: len(prompt)], prompt)
            assert batch.loss_mask[row].any() and not batch.loss_mask[row][0]
            last = batch.mask[row].sum() - 1
            assert batch.tokens[row][last] in tokenizers[name].stop_ids and batch.loss_mask[row][last]
        completion, assistant = batches
        assert not completion.loss_mask[row][: len(prompt)].any()
        np.testing.assert_array_equal(completion.tokens[row], assistant.tokens[row])
        after = np.arange(completion.tokens.shape[1]) >= len(prompt)
        np.testing.assert_array_equal(completion.loss_mask[row], assistant.loss_mask[row] & after)
        theirs = tokenizers[name].wrapped.apply_chat_template(messages["messages"], tokenize=True, return_dict=True)
        ours = completion.tokens[row][completion.mask[row]].tolist()
        assert ours == theirs["input_ids"][: len(ours)]


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_long_chats_keep_bos_the_end_of_the_prompt_and_the_beginning_of_the_answer(tokenizers, name):
    tokenizer, row = tokenizers[name], {"messages": FOUR}
    (prompt, response) = (WHOLE[: -len("it's the best<|im_end|>")], "it's the best<|im_end|>")
    head = list(tokenizer.prefix)
    kept = [*head, *tokenizer.encode(prompt)[-20 + len(head) :]]
    for loss_on in ("completion", "assistant"):
        small = config(loss_on=loss_on, max_prompt_tokens=20, max_response_tokens=3)
        batch = pipeline.demonstrations([row], tokenizer, small).all()
        assert batch.tokens[0].tolist() == kept + tokenizer.encode(response)[:3]
    asked = pipeline.prompts([row], tokenizer, small)
    assert asked.tokens[0].tolist() == kept
    trained = shown(tokenizer, batch.tokens[0], batch.loss_mask[0])
    assert trained.endswith(tokenizer.decode(tokenizer.encode(response)[:3]))


JOINED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("loss_on", ["completion", "assistant"])
def test_a_template_that_ends_nothing_leaves_it_to_eos(tmp_path, loss_on):
    backend = tokenizer_files.byte_bpe(["<|endoftext|>"])
    tokenizer = load_tokenizer(tokenizer_files.save(tmp_path, backend, JOINED, eos_token="<|endoftext|>"))
    (one,) = learnt(tokenizer, [{"messages": say("is it?", " yes")}], loss_on=loss_on)
    assert one == ("is it? yes<|endoftext|>", " yes<|endoftext|>")
    (small,) = learnt(tokenizer, [{"messages": say("is it?", " yes")}], loss_on=loss_on, max_response_tokens=1)
    assert small[0] != one[0] and one[1].startswith(small[1])


def test_the_first_token_of_all_is_given_though_a_template_marks_it(tmp_path):
    backend = tokenizer_files.byte_bpe(["<|endoftext|>"])
    template = JOINED.replace("{{ message['content'] }}", "{% generation %}{{ message['content'] }}{% endgeneration %}")
    tokenizer = load_tokenizer(tokenizer_files.save(tmp_path, backend, template, eos_token="<|endoftext|>"))
    batch = pipeline.demonstrations([{"messages": say("x", "y")}], tokenizer, config(loss_on="assistant")).all()
    assert batch.loss_mask[0].tolist() == [False, True, True]


def test_where_the_border_merges_the_prompt_stays_as_it_is_and_it_is_told(tmp_path, caplog):
    backend = tokenizer_files.byte_bpe(["<|endoftext|>"])
    tokenizer = load_tokenizer(tokenizer_files.save(tmp_path, backend, JOINED, eos_token="<|endoftext|>"))
    assert tokenizer.encode("the film") != [*tokenizer.encode("the fi"), *tokenizer.encode("lm")]
    rows = [{"messages": say("the fi", "lm")}]
    batch = pipeline.demonstrations(rows, tokenizer, CONFIG).all()
    assert batch.tokens[batch.mask].tolist() == [*tokenizer.encode("the fi"), *tokenizer.encode("lm"), 0]
    asked = pipeline.prompts(rows, tokenizer, CONFIG)
    assert asked.tokens[asked.mask].tolist() == tokenizer.encode("the fi")
    assert [record.getMessage()[:40] for record in caplog.records] == ["In 1 of 1 rows (the first is row 1) a to"]


@pytest.mark.parametrize(
    ("name", "prompt", "completion", "merges"),
    [
        ("gpt2", "the fi", "lm was good", True),
        ("gpt2", "is\n", "\n", True),
        ("gpt2", "the film was", " good", False),
        ("llama2", "the fi", "lm was good", True),
        ("llama2", "the film was", " good", False),
    ],
)
def test_what_is_cut_in_two_gains_no_space(tokenizers, caplog, name, prompt, completion, merges):
    (example,) = pipeline.tokenise([prompt], [completion], tokenizers[name], CONFIG)
    assert tokenizers[name].decode(example.prompt) == prompt
    assert tokenizers[name].decode_completion(example.prompt, example.response) == completion
    assert len(caplog.records) == merges


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("chatml", {"messages": FOUR[:1]}, r"row 2 of the data: the chat has no message of the assistant"),
        ("llama2", {"messages": FOUR[1:]}, r"row 2 of the data: the chat template rejects .* must alternate"),
        ("chatml", {"prompt": FOUR[:1], "completion": FOUR[:1]}, r"row 2 .*but writes 'user.* instead of 'assis"),
    ],
)
def test_what_a_template_cannot_write_names_the_row(tokenizers, name, row, message):
    good = {"prompt": FOUR[:1], "completion": FOUR[1:2]} if "prompt" in row else {"messages": FOUR[:2]}
    rows = [good, row]
    with pytest.raises(RlhfError, match=message):
        pipeline.demonstrations(rows, tokenizers[name], CONFIG)


@pytest.mark.parametrize("loss_on", ["completion", "assistant"])
def test_a_checkpoint_without_a_template_reads_no_chats(tokenizers, loss_on):
    with pytest.raises(RlhfError, match=r"row 1 of the data: the tokenizer has no chat template.*chat_template\.jinja"):
        pipeline.demonstrations([{"messages": FOUR}], tokenizers["gpt2"], config(loss_on=loss_on))


def test_a_template_that_writes_earlier_answers_anew_tells_only_the_last(tokenizers):
    rows = [{"messages": FOUR}]
    with pytest.raises(RlhfError, match=r"row 1 of the data: the chat template renders message 2 differently"):
        pipeline.demonstrations(rows, tokenizers["last"], config(loss_on="assistant"))


def test_a_template_that_asks_otherwise_than_it_answers_is_reported(tokenizers):
    with pytest.raises(
        RlhfError, match=r"row 1 of the data: the chat template ends the prompt with '.*assistant: \\n'"
    ):
        pipeline.demonstrations([{"messages": FOUR}], tokenizers["other start"], CONFIG)


def test_a_template_that_marks_nothing_is_reported(tmp_path):
    template = MARKED.replace("message['role'] == 'assistant'", "message['role'] == 'model'")
    tokenizer = load_tokenizer(tokenizer_files.chatml(tmp_path, template))
    with pytest.raises(RlhfError, match="row 1 of the data: the chat template marks no token"):
        pipeline.demonstrations([{"messages": FOUR}], tokenizer, config(loss_on="assistant"))


def test_texts_have_no_assistant(tokenizers):
    with pytest.raises(RlhfError, match="loss_on = 'assistant' needs chats, but the rows are texts"):
        pipeline.demonstrations([{"text": "x"}], tokenizers["chatml"], config(loss_on="assistant"))


def test_a_tokenizer_of_ours_reads_no_chats():
    with pytest.raises(RlhfError, match=r"trained by rlhf_jax has no chat template, .*give texts"):
        pipeline.training_texts([{"messages": FOUR}])
    tokenizer = train_tokenizer(TokenizerConfig("word", 100), ["it is good"])
    calls = (pipeline.demonstrations, pipeline.prompts)
    for call, loss_on in zip((*calls, calls[0]), ("completion", "completion", "assistant"), strict=True):
        with pytest.raises(RlhfError, match="row 1 of the data: a tokenizer trained by rlhf_jax has no chat template"):
            call([{"messages": FOUR}], tokenizer, config(loss_on=loss_on))


def test_a_question_is_what_awaits_an_answer():
    assert chat.question(FOUR) == FOUR[:3] and chat.question(FOUR[:3]) == FOUR[:3] and chat.question([]) == []
    assert chat.last_answer([*FOUR, *say("bye")]) == (FOUR[:3], FOUR[3:])
