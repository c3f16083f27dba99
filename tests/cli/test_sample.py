"""`rlhf-jax sample` of a checkpoint; of a stage it is tested in tests/test_main.py."""

import pytest

from rlhf_jax.loading import samples
from rlhf_jax.loading.models import Policy
from rlhf_jax.loading.pretrained import load_checkpoint
from tests.support import checkpoints, tokenizer_files
from tests.support.commands import fails, succeeds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "policy"
    return f"--model={checkpoints.policy(directory)}"


def test_text_goes_on_and_a_message_is_answered(model, capsys):
    asked = ["sample", model, "--prompt=The film", "--temperature=0", "--max-new-tokens=8"]
    text = succeeds(capsys, *asked)
    assert text.startswith("The film")
    assert len(text) > len("The film\n")
    assert succeeds(capsys, *asked) == text
    endless = succeeds(capsys, *asked[:-1], f"--max-new-tokens={2**40}")  # the model's room, and no memory for more
    assert endless.startswith(text.removesuffix("\n"))
    answer = succeeds(capsys, *asked, "--chat")
    assert not answer.startswith("The film")
    policy = load_checkpoint(model.removeprefix("--model="))
    assert isinstance(policy, Policy)
    rendered = policy.tokenizer.render([{"role": "user", "content": "The film"}], add_generation_prompt=True)
    assert succeeds(capsys, *asked[:2], f"--prompt={rendered}", *asked[3:]) == rendered + answer


@pytest.mark.nightly
def test_seeds_and_numbers_of_responses(model, capsys):
    asked = ["sample", model, "--prompt=The film", "--prompt=It", "--max-new-tokens=6"]
    assert len(succeeds(capsys, *asked, "--temperature=0").split("\n\n")) == 2
    four = succeeds(capsys, *asked)
    assert four == succeeds(capsys, *asked, "--seed=0", "--n=4")
    assert four != succeeds(capsys, *asked, "--seed=1")
    assert four.count("The film") == 4
    # One way to be certain: the most likely token and no other.
    assert succeeds(capsys, *asked, "--top-k=1", "--n=1") == succeeds(capsys, *asked, "--temperature=0")


def test_a_stop_string_ends_the_text_before_it(model, capsys, monkeypatch):
    cuts, cut = [], samples.cut

    def recorded(tokenizer, prompt, response, stops):
        found = cut(tokenizer, prompt, response, stops)
        cuts.append((found[0], len(response)))
        return found

    monkeypatch.setattr(samples, "cut", recorded)
    asked = ["sample", model, "--prompt=The film", "--temperature=0", "--max-new-tokens=20"]
    written = succeeds(capsys, *asked).removeprefix("The film").removesuffix("\n")
    stop = written[7:9]
    stopped = succeeds(capsys, *asked, f"--stop={stop}", "--stop=never said")
    assert stopped == f"The film{written[: written.index(stop)]}\n"
    whole, ended = cuts[:2]
    assert ended[0] == ended[1] < whole[1]  # no token is drawn after it


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--temperature=-1", "--temperature = -1.0 must be at least 0"),
        ("--top-p=2", "--top-p = 2.0 must be above 0 and at most 1"),
        ("--top-k=0", "--top-k = 0 must be at least 1"),
        ("--max-new-tokens=0", "--max-new-tokens = 0 must be at least 1"),
        ("--n=0", "--n=0 must be at least 1"),
        ("--stop=", "--stop = '' is empty"),
        (f"--prompt={'word ' * 200}", "tokens, but the context is 256"),
    ],
)
def test_flags_that_cannot_be(model, flag, words, capsys):
    assert words in fails(capsys, "sample", model, "--prompt=The film", flag)


def test_a_message_needs_a_template(tmp_path, capsys):
    directory = checkpoints.policy(tmp_path / "gpt2", tokenizer_files.gpt2)
    assert "no chat template" in fails(capsys, "sample", f"--model={directory}", "--prompt=x", "--chat")
