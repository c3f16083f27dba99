"""History of a conversation, and its requests to the model."""

import jax
import numpy as np
import pytest

from rlhf_jax.cli.conversation import Answer, Conversation
from rlhf_jax.core.sequences import joined
from rlhf_jax.data.padding import pad_right
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.samples import respond
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.types import RlhfError, Rollout
from tests.support import checkpoints, tokenizer_files

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def loaded(make, tokenizer=tokenizer_files.chatml, **changes):
        return load_checkpoint(str(make(tmp_path_factory.mktemp("checkpoint") / "model", tokenizer, **changes)))

    return loaded


@pytest.fixture(scope="module")
def policy(load) -> Policy:
    return load(checkpoints.policy, never=(2,))


def begin(policy: Policy, tokens: int = 6, temperature: float = 1.0, stops=()) -> Conversation:
    sampling = Sampling(tokens, temperature, policy.tokenizer.stop_ids)
    return Conversation(policy, sampling, KEY, list(stops))


def say(conversation: Conversation, text: str) -> tuple[str, Answer]:
    answer = Answer()
    return "".join(conversation.reply(text, answer)), answer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def expected(policy: Policy, text: str, row: int, tokens: int = 6) -> str:
    """The answer of the verb sample to a rendered text."""
    sampling = Sampling(tokens, 1.0, policy.tokenizer.stop_ids)
    ids = policy.tokenizer.encode(text)
    return respond(policy, [ids], KEY, sampling, [], samples=1, batch_size=1, first=row).texts[0]


def test_each_answer_is_one_to_all_that_was_said(policy):
    conversation, tokenizer = begin(policy), policy.tokenizer
    conversation.set_system("Be short.")
    first, answer = say(conversation, "Is it good?")
    asked = [{"role": "system", "content": "Be short."}, user("Is it good?")]
    assert first == expected(policy, tokenizer.render(asked, add_generation_prompt=True), 0)
    assert (answer.tokens, answer.cut) == (6, True)
    second, _ = say(conversation, "Why?")
    asked += [assistant(first), user("Why?")]
    assert second == expected(policy, tokenizer.render(asked, add_generation_prompt=True), 1)
    conversation.reset()
    conversation.set_system(None)
    third, _ = say(conversation, "Why?")
    assert third == expected(policy, tokenizer.render([user("Why?")], add_generation_prompt=True), 2)
    assert conversation.messages == [user("Why?"), assistant(third)]


def test_what_was_given_out_before_a_stop_is_remembered(policy):
    conversation = begin(policy, tokens=60, temperature=0.0)
    whole, answer = say(conversation, "Is it good?")
    conversation.reset()
    pieces = conversation.reply("Is it good?", Answer())
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages == [user("Is it good?"), assistant(heard)]
    assert whole.startswith(heard)
    assert answer.tokens == 60


def test_a_stop_string_ends_an_answer(policy):
    whole, _ = say(begin(policy, tokens=40, temperature=0.0), "Is it good?")
    stop = whole[4:6]
    conversation = begin(policy, tokens=40, temperature=0.0, stops=[stop])
    cut, answer = say(conversation, "Is it good?")
    assert cut == whole[: whole.index(stop)] == conversation.messages[-1]["content"]
    assert not answer.cut
    assert answer.tokens < 40


def test_without_a_template_the_text_goes_on(load):
    policy = load(checkpoints.policy, tokenizer_files.gpt2)
    conversation = begin(policy)
    first, _ = say(conversation, "The film")
    assert first == expected(policy, "The film", 0)
    second, _ = say(conversation, "It")
    assert second == expected(policy, f"The film{first}\nIt", 1)
    with pytest.raises(RlhfError, match="no chat template and takes no system message"):
        conversation.set_system("Be short.")


def test_a_refused_message_is_forgotten(load, policy):
    conversation = begin(policy)
    say(conversation, "Is it good?")
    before = list(conversation.messages)
    with pytest.raises(RlhfError, match=r"tokens, but the context is 256"):
        say(conversation, "word " * 200)
    assert conversation.messages == before
    # A template that has no system messages.
    llama2 = begin(load(checkpoints.policy, tokenizer_files.llama2))
    with pytest.raises(RlhfError, match="the chat template rejects these messages"):
        llama2.set_system("Be short.")
    assert llama2.system is None
    say(llama2, "Is it good?")


def test_a_message_is_taken_back_and_answered_with_a_new_key(policy):
    conversation = begin(policy)
    first, _ = say(conversation, "Is it good?")
    say(conversation, "Why?")
    assert conversation.undo() == "Why?" and conversation.messages == [user("Is it good?"), assistant(first)]
    again, _ = say(conversation, conversation.undo())
    asked = policy.tokenizer.render([user("Is it good?")], add_generation_prompt=True)
    assert again == expected(policy, asked, 2) and conversation.messages == [user("Is it good?"), assistant(again)]
    conversation.reset()
    with pytest.raises(RlhfError, match="there is no message to take back"):
        conversation.undo()


def test_another_policy_continues_before_the_last_message(policy):
    conversation = begin(policy)
    conversation.set_system("Be short.")
    first, _ = say(conversation, "Is it good?")
    second, _ = say(conversation, "Why?")
    other = conversation.with_policy(policy._replace(params=jax.tree.map(lambda leaf: 2 * leaf, policy.params)))
    assert other.messages == [user("Is it good?"), assistant(first)] and other.system == "Be short."
    say(other, "Why?")
    assert conversation.messages[-1] == assistant(second), "it keeps its own answer"
    assert conversation.as_row()["messages"][0] == {"role": "system", "content": "Be short."}


def test_the_context_cuts_an_answer(policy):
    conversation = begin(policy, tokens=1000, temperature=0.0)
    _, answer = say(conversation, "Is it good?")
    prompt = policy.tokenizer.render([user("Is it good?")], add_generation_prompt=True)
    assert answer.tokens == 256 - len(policy.tokenizer.encode(prompt))
    assert answer.cut


def score(judge: RewardModel, text: str) -> float:
    ids = judge.tokenizer.encode(text)
    rollout = Rollout(np.array([ids[:1]], np.int32), np.ones((1, 1), bool), *pad_right([ids[1:]], 255))
    return float(jax.jit(judge.network.scores)(judge.params, joined(rollout))[0])


def test_scores_are_those_of_the_written_conversation(load, policy):
    conversation = begin(policy)
    with pytest.raises(RlhfError, match="there is no answer to score yet"):
        conversation.score(load(checkpoints.reward_model))
    said = say(conversation, "Is it good?")[0], say(conversation, "Why?")[0]  # cut off: the last one has no end
    judge = load(checkpoints.reward_model)
    messages = [user("Is it good?"), assistant(said[0]), user("Why?"), assistant(said[1])]
    text = judge.tokenizer.render(messages, add_generation_prompt=False)
    assert conversation.score(judge) == pytest.approx(
        score(judge, text[: text.rindex(said[1]) + len(said[1])]), abs=1e-5
    )
    # With a tokenizer of its own, and no template: the texts.
    other = load(checkpoints.reward_model, tokenizer_files.gpt2)
    text = f"Is it good?{said[0]}\nWhy?{said[1]}"
    assert conversation.score(other) == pytest.approx(score(other, text), abs=1e-5)
    # An answer that ended has its end: the template's, or the end of a text.
    ended = begin(policy, tokens=40, temperature=0.0, stops=[say(begin(policy, 40, 0.0), "Is it good?")[0][4:6]])
    answer = say(ended, "Is it good?")[0]
    text = judge.tokenizer.render([user("Is it good?"), assistant(answer)], add_generation_prompt=False)
    assert ended.score(judge) == pytest.approx(score(judge, text.removesuffix("\n")), abs=1e-5)
    with_end = ended.score(judge)
    assert ended.score(other) == pytest.approx(score(other, f"Is it good?{answer}<|endoftext|>"), abs=1e-5)
    # Also after a further answer, which had no end, was taken back.
    list(ended.reply("Why?", Answer()))
    ended.undo()
    assert ended.score(judge) == with_end
