"""Networks with a scalar head: reward models (one score per response) and value functions (one value per token)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree

from rlhf_jax.core.sequences import by_response, predictors
from rlhf_jax.models import lora
from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.reading import last_hidden, mean_hidden, reading
from rlhf_jax.models.reward_ensemble import EnsembleConfig, combined
from rlhf_jax.models.scalar_transformer import ScalarTransformer
from rlhf_jax.types import Sequences

Pooling = Literal["mean", "last"]


@dataclasses.dataclass(frozen=True)
class ScalarNetwork:
    """Transformer with a scalar head, as pure functions; `pooling` selects the hidden states that a score uses.

    Parameters are plain, or `Adapted` if the network has a LoraConfig. `dropout_keys`, one per row, enable the
    adapter's dropout. Parameters of an ensemble are plain, and every leaf has a leading axis over the members; `init`,
    `values` and the adapter methods apply to a single network.
    """

    config: ModelConfig
    vocab_size: int
    pooling: Pooling
    bias: bool = True  # of the head; transformers' classifiers have none
    lora: LoraConfig | None = None
    ensemble: EnsembleConfig | None = None

    def __post_init__(self) -> None:
        lora.check_layers(self.config, self.lora)

    @property
    def alone(self) -> "ScalarNetwork":
        """Network of one member of an ensemble."""
        return dataclasses.replace(self, ensemble=None)

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Initialise random parameters: `body` and `head`."""
        return _init(self._module, key)

    def init_value(self, reward_params: PyTree) -> PyTree:
        """Initialise a value function from the reward model's body and a zero head.

        Huang et al. 2024 (arXiv:2403.17031) initialise the value function from the reward model; the zero head of
        Ziegler et al. 2019 makes the first advantages the rewards to come. For an ensemble, the first member is used.
        """
        if self.ensemble is not None:
            reward_params = jax.tree.map(lambda leaf: leaf[0], reward_params)
        return {"body": reward_params["body"], "head": jax.tree.map(jnp.zeros_like, reward_params["head"])}

    def init_adapter(self, params: PyTree, key: PRNGKeyArray) -> PyTree:
        """Initialise an adapter for plain parameters or their shapes: a LoRA adapter of the body, and the full head.

        The head is small and starts from random or zero weights, so it is trained in full (PEFT: `modules_to_save`).
        Like the adapter, it is always float32.
        """
        head = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params["head"])
        return {"body": lora.init_adapter(lora.required(self.lora), params["body"], key), "head": head}

    def merge(self, params: Adapted) -> PyTree:
        """Merge the adapter into plain parameters; see `lora.merge`."""
        body = lora.merge(params.base["body"], params.adapter["body"], lora.required(self.lora))
        return {"body": body, "head": params.adapter["head"]}

    def scores(
        self, params: PyTree, sequences: Sequences, *, dropout_keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B"]:
        """Score each response from the mean hidden state of prompt and response, or the hidden state of the last token.

        For an ensemble, returns the combined score of its members.
        """
        if self.ensemble is not None:
            return combined(self.ensemble, self.member_scores(params, sequences))
        pool = mean_hidden if self.pooling == "mean" else last_hidden
        return self._apply(params, pool(self._hidden(params, sequences, dropout_keys), sequences))

    def member_scores(self, params: PyTree, sequences: Sequences) -> Float[Array, "members B"]:
        """Scores of each member of an ensemble, in one batched computation."""
        return jax.vmap(lambda member: self.alone.scores(member, sequences))(params)

    def values(
        self, params: PyTree, sequences: Sequences, *, dropout_keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B T"]:
        """Value of the state before each response token."""
        values = self._apply(params, self._hidden(params, sequences, dropout_keys))
        return by_response(predictors(values, sequences), sequences)

    @property
    def _module(self) -> ScalarTransformer:
        return ScalarTransformer(dataclasses.replace(self.config, tied=True), self.vocab_size, self.bias)

    def _apply(
        self, params: PyTree, *args: Any, method: str | None = None, dropout_keys: Key[Array, "B"] | None = None
    ) -> Any:
        if isinstance(params, Adapted):
            params = Adapted(params.base | {"head": params.adapter["head"]}, params.adapter)
        return lora.apply(self._module, params, self.lora, *args, method=method, dropout_keys=dropout_keys)

    def _hidden(self, params: PyTree, sequences: Sequences, dropout_keys: Key[Array, "B"] | None) -> Array:
        rows, keys = reading(sequences, dropout_keys)
        return self._apply(params, *rows, method="hidden", dropout_keys=keys)


@functools.partial(jax.jit, static_argnums=0)  # compiled once per architecture
def _init(module: ScalarTransformer, key: PRNGKeyArray) -> PyTree:
    return module.init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool), method="parameters")["params"]


def normalised_head(head: PyTree, moments: Sequence[Sequence[float]], *, stacked: bool) -> PyTree:
    """Fold the normalisation (score - mean) / deviation into a float32 head with a bias.

    Args: stacked means that leaves have a leading axis over ensemble members, with separate moments.
    """
    kernel = head["kernel"].astype(jnp.float32)
    mean, deviation = (jnp.asarray(each, jnp.float32) for each in zip(*moments, strict=True))
    mean, deviation = (each.reshape(-1, 1) if stacked else each for each in (mean, deviation))
    bias = head["bias"].astype(jnp.float32) if "bias" in head else jnp.zeros_like(mean)
    return {"kernel": kernel / deviation[..., None], "bias": (bias - mean) / deviation}
