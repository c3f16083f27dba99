"""What a stage is given beside its own config, and how it finds what earlier stages left."""

import dataclasses
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax import config as configs
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.checkpoints import load_params
from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.runtime.programs import Placement, RuntimeConfig, make_placement
from rlhf_jax.runtime.progress import Bar
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class Context:
    """One stage's surroundings. Run k of an online stage uses seed + k; other stages have one run."""

    workdir: Workdir
    name: str
    seed: int
    seeds: int
    data: DataConfig
    runtime: RuntimeConfig
    bar: Bar

    @property
    def directory(self) -> Path:
        """Where this stage writes."""
        return self.workdir.directory(self.name)

    def key(self, seed_index: int = 0) -> PRNGKeyArray:
        """The stage's random key: its name folded into the seed."""
        return jax.random.fold_in(jax.random.key(self.seed + seed_index), zlib.crc32(self.name.encode()))

    def placement(self, seeds: int = 1) -> Placement:
        """The devices, for a stage with this many runs at once."""
        return make_placement(self.runtime, seeds)

    def sampling(self, tokenizer: Tokenizer, temperature: float) -> Sampling:
        """Responses of the length that the data has room for."""
        return Sampling(self.data.max_response_tokens, temperature, tokenizer.stop_ids)

    def policy(self, stage: str) -> "Policy":
        """The policy that an earlier stage trained; the first seed's where there are several."""
        return load_policy(self.workdir.find(stage), seed=self.seed, step=None)

    def reward_model(self, stage: str) -> "RewardModel":
        """The reward model that an earlier stage trained."""
        return load_reward_model(self.workdir.find(stage))


class Policy(NamedTuple):
    """A language model one can use: its network, its parameters and its tokenizer."""

    network: PolicyNetwork
    params: PyTree
    tokenizer: Tokenizer


class RewardModel(NamedTuple):
    """A reward model one can use; it reads the tokens of the tokenizer."""

    network: ScalarNetwork
    params: PyTree
    tokenizer: Tokenizer


def save_policy_spec(directory: Path, network: PolicyNetwork, tokenizer: Tokenizer, seeds: range) -> None:
    """Writes what is needed beside the checkpoints to load a policy: `model.json`, `tokenizer/`."""
    tokenizer.save(directory / "tokenizer")
    spec = {"config": dataclasses.asdict(network.config), "vocab_size": network.vocab_size}
    write_json(directory / "model.json", {**spec, "network": "policy", "seeds": [seeds.start, seeds.stop]})


def save_reward_spec(directory: Path, network: ScalarNetwork, tokenizer: Tokenizer) -> None:
    """Writes what is needed beside the checkpoints to load a reward model."""
    tokenizer.save(directory / "tokenizer")
    spec = {"config": dataclasses.asdict(network.config), "vocab_size": network.vocab_size}
    write_json(directory / "model.json", {**spec, "network": "reward", "pooling": network.pooling})


def load_policy(directory: Path, *, seed: int, step: int | None) -> Policy:
    """A stage's policy. Raises RlhfError where the stage trains none, or has no such seed or checkpoint."""
    spec = _read_spec(directory, "policy")
    tokenizer = load_tokenizer(directory / "tokenizer")
    network = PolicyNetwork(_model_config(spec, directory), spec["vocab_size"], tokenizer.suppressed)
    first, stop = spec["seeds"]
    if not first <= seed < stop:
        raise RlhfError(f"{directory} holds seeds {first} to {stop - 1}, not {seed}")
    one = jax.eval_shape(network.init, jax.random.key(0))
    if stop - first == 1:
        return Policy(network, load_params(directory / "checkpoints", "policy", one, step=step), tokenizer)
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((stop - first, *leaf.shape), leaf.dtype), one)
    params = load_params(directory / "checkpoints", "policy", stacked, step=step)
    return Policy(network, jax.tree.map(lambda leaf: leaf[seed - first], params), tokenizer)


def load_reward_model(directory: Path) -> RewardModel:
    """A stage's reward model. Raises RlhfError where the stage trains none."""
    spec = _read_spec(directory, "reward")
    network = ScalarNetwork(_model_config(spec, directory), spec["vocab_size"], spec["pooling"])
    like = jax.eval_shape(network.init, jax.random.key(0))
    params = load_params(directory / "checkpoints", "reward", like, step=None)
    return RewardModel(network, params, load_tokenizer(directory / "tokenizer"))


def steps_for(epochs: float, rows: int, batch_size: int, steps_per_call: int) -> int:
    """Steps that see every row `epochs` times, rounded to whole calls, of which there is at least one."""
    return max(1, round(epochs * rows / batch_size / steps_per_call)) * steps_per_call


def _read_spec(directory: Path, network: str) -> dict:
    if not (directory / "model.json").exists():
        raise RlhfError(f"stage {directory.name!r} in {directory.parent} trains no model: name one that does")
    spec = read_json(directory / "model.json")
    if spec["network"] != network:
        raise RlhfError(f"stage {directory.name!r} in {directory.parent} trains a {spec['network']}, not a {network}")
    return spec


def _model_config(spec: dict, directory: Path) -> ModelConfig:
    return configs.build(ModelConfig, spec["config"], f"{directory / 'model.json'}: config")
