import dataclasses
from typing import Literal

import pytest
from ml_collections import ConfigDict

from rlhf_jax import config
from rlhf_jax.config import FunctionSource
from rlhf_jax.types import RlhfError
from rlhf_jax.user_code import load, options_of

FILE = """
def plain(a, b): ...
def by_keyword(a, b, *, beta, scale=1.0): ...
def by_name(a, b, beta): ...
def anything(a, b, **kwargs): ...
def turned(b, a): ...
def fewer(a): ...
def more(a, b, c): ...
def misspelt(a, b, *, betta): ...
def only_keywords(*, a, b): ...
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(FILE)
    return path


def options(file, name, known=("beta", "tau")):
    source = f"{file}:{name}"
    return options_of(load(source, "loss"), source, "loss", arguments=("a", "b"), options=known)


def test_a_function_reads_the_options_that_its_signature_names(file):
    assert options(file, "plain") == options(file, "anything") == ()
    assert options(file, "by_keyword") == options(file, "by_name") == ("beta",)


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("turned", r"\(b, a\)"),
        ("fewer", r"\(a\)"),
        ("more", r"\(a, b, c\)"),
        ("misspelt", r"\(a, b, \*, betta\)"),
        ("only_keywords", r"\(\*, a, b\)"),
    ],
)
def test_a_wrong_signature_is_one_message_with_the_right_one(file, name, signature):
    expected = rf"loss .*mine.py:{name} has the signature {signature}: write `def {name}\(a, b, \*, ...\)`, where ... "
    with pytest.raises(RlhfError, match=expected + "may be beta, tau"):
        options(file, name)
    with pytest.raises(RlhfError, match=rf"write `def {name}\(a, b\)`$"):
        options(file, name, known=())


@dataclasses.dataclass(frozen=True)
class Stage:
    loss: Literal["ppo", "gspo"] | FunctionSource
    losses: tuple[Literal["sigmoid"] | FunctionSource, ...] = ()
    kind: Literal["ppo"] = "ppo"


def test_only_functions_of_the_user_are_inputs_of_a_stage():
    losses = ("sigmoid", "mine.py:f", "mine.py:g")
    built = config.build(Stage, ConfigDict({"loss": "ppo", "losses": losses}), "config.rl")
    assert config.functions(built) == ("mine.py:f", "mine.py:g")
    assert config.functions(dataclasses.replace(built, loss=FunctionSource("mine.py:f"))) == losses[1:]


def test_a_misspelt_name_is_no_function():
    with pytest.raises(
        RlhfError,
        match=r"config.rl.loss = 'pppo' should be one of 'ppo', 'gspo' or a name in a Python file or module, as",
    ):
        config.build(Stage, ConfigDict({"loss": "pppo"}), "config.rl")
