"""Attention by cuDNN as a stage's sections ask for it: where it cannot be had, and what is written of it."""

import dataclasses
import io
import json
from typing import Any

import pytest
from rich.console import Console

from rlhf_jax.config import ModelSource
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import Policy, Pretrained, Tuning, tuned
from rlhf_jax.loading.stage_models import save_policy_spec
from rlhf_jax.loading.trainable import load_initial_policy
from rlhf_jax.models.reward_ensemble import EnsembleConfig
from rlhf_jax.runtime.progress import Display
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.stages.reward_model import RewardModelConfig
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from rlhf_jax.types import RlhfError
from tests.support import tiny


def policy() -> Policy:
    return Policy(tiny.POLICY, None, train_tokenizer(TokenizerConfig("word", tiny.VOCAB), ["a b"]))


def test_a_model_takes_it_in_half_precision_and_is_read_without_it(tmp_path):
    with pytest.raises(RlhfError, match=r"'cudnn' does not support compute_dtype = 'float32', only bfloat16 and"):
        tuned(policy(), Tuning(attention="cudnn"))
    half = tuned(policy(), Tuning(attention="cudnn", compute_dtype="bfloat16"))
    assert isinstance(half, Policy) and half.network.config.attention == "cudnn"
    save_policy_spec(tmp_path, half, range(1))
    assert json.loads((tmp_path / "model.json").read_text())["config"]["attention"] == "xla"
    assert tuned(half, Tuning()).network.config == dataclasses.replace(half.network.config, attention="xla")


def test_members_of_an_ensemble_do_without_it():
    fields: dict[str, Any] = {"kind": "reward_model", "policy": None, "preferences": None, "pooling": "last"}
    fields |= {"optimizer": tiny.OPTIMIZER, "batch_size": 4, "epochs": 1.0, "eval_every": 1, "loop": tiny.LOOP}
    model = Pretrained(init=ModelSource("sft"), attention="cudnn")
    assert RewardModelConfig(**fields, model=model).ensemble is None
    with pytest.raises(ValueError, match=r"model.attention = 'cudnn' does not support ensembles"):
        RewardModelConfig(**fields, model=model, ensemble=EnsembleConfig(members=2, combine="mean"))


@pytest.fixture
def context_of(tmp_path):
    """Function from a number of seeds to the context of a stage on one CPU device."""
    data = DataConfig(
        train="", eval="", test=None, limit=None, text_prompt_tokens=(1, 2), max_prompt_tokens=4, max_response_tokens=4
    )
    display = Display(Console(file=io.StringIO()))
    with display.running(), display.bar("ppo") as bar:
        fields = Workdir(tmp_path, None), ("ppo",), "ppo", 0
        yield lambda seeds: Context(*fields, seeds, data, tiny.ONE_DEVICE, bar)


def test_it_is_refused_where_there_is_no_gpu(context_of):
    with pytest.raises(
        RlhfError, match=r"config.ppo: attention = 'cudnn' needs an NVIDIA GPU, but this runs on cpu: set it to 'xla'"
    ):
        load_initial_policy(ModelSource("sft"), Tuning(attention="cudnn"), context_of(1))


def test_several_seeds_do_without_it(context_of):
    with pytest.raises(RlhfError, match=r"config.ppo: attention = 'cudnn' does not support several seeds at once"):
        load_initial_policy(ModelSource("sft"), Tuning(attention="cudnn"), context_of(2))
