"""Counts of repeated rows, of pairs with equal answers, and of rows that the training split also has."""

import pytest

from rlhf_jax.data import counts


def pair(prompt, chosen="good", rejected="bad", **further):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **further}


def chat(text):
    return [{"role": "user", "content": text}]


def test_a_row_is_repeated_if_all_its_texts_are():
    rows = [pair("a", id=1), pair("a", id=2), pair("a", chosen="fine"), pair("b"), pair("a", id=3)]
    assert counts.repeated(rows) == 2
    labelled = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, True)]
    assert counts.repeated(labelled) == 1


def test_chats_are_compared_by_their_messages():
    rows = [{"messages": chat(text)} for text in "aba"]
    assert counts.repeated(rows) == 1
    ranked = [{"prompt": "a", "completions": answers} for answers in (["b", "c"], ["c", "b"], ["b", "c"])]
    assert counts.repeated(ranked) == 1


def test_equal_answers_are_counted_in_pairs_only():
    assert counts.equal_answers([pair("a"), pair("b", "same", "same"), pair("c", chat("x"), chat("x"))]) == 2
    assert counts.equal_answers([{"text": "a"}]) is None


@pytest.mark.parametrize("as_prompt", [str, chat])
def test_rows_with_prompts_are_shared_if_their_prompt_is(as_prompt):
    training = [pair(as_prompt("a")), pair(as_prompt("b"))]
    held_out = [pair(as_prompt("a"), "other"), pair(as_prompt("c")), pair(as_prompt("a"))]
    assert counts.shared(held_out, training) == (2, "prompt")


def test_an_answer_in_messages_is_not_part_of_the_prompt():
    def asked(text, answer):
        return {"messages": [*chat(text), {"role": "assistant", "content": answer}]}

    assert counts.shared([asked("a", "x"), asked("b", "x")], [asked("a", "y")]) == (1, "prompt")


def test_rows_without_prompts_are_shared_if_all_their_texts_are():
    assert counts.shared([{"text": "a"}, {"text": "b"}], [{"text": "b"}]) == (1, "content")
    unprompted = [pair("", "x", "y"), pair("", "x", "z")]
    assert counts.shared(unprompted, [pair("", "x", "z")]) == (1, "content"), "an empty prompt is not shared"
    assert counts.shared([pair(""), pair("a")], [pair(""), pair("a")]) == (1, "prompt")
