"""Policy network: a transformer with a language-model head, as pure functions of its parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from rlhf_jax.core import packing
from rlhf_jax.core.sequences import by_response, predictors, targets
from rlhf_jax.models import head, lora
from rlhf_jax.models.head import TokenStats
from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.reading import reading
from rlhf_jax.models.transformer import KVCache, Transformer, empty_cache
from rlhf_jax.types import PreferenceBatch, Sequences, TokenBatch


@dataclasses.dataclass(frozen=True)
class PolicyNetwork:
    """Language model that assigns probability 0 to its suppressed tokens (padding, BOS, unknown).

    If a text nevertheless contains a suppressed token (such as an unknown word), its log-probability is reported as 0,
    so that it does not affect losses.

    Parameters are plain, or `Adapted` if the network has a LoraConfig. `dropout_keys`, one per row, enable the
    adapter's dropout.
    """

    config: ModelConfig
    vocab_size: int
    suppressed: tuple[int, ...]
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        lora.check_layers(self.config, self.lora)

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Initialise random parameters."""
        return _init(self._body, key)

    def init_adapter(self, params: PyTree, key: PRNGKeyArray) -> PyTree:
        """Initialise an adapter for plain parameters or their shapes; see `lora.init_adapter`."""
        return lora.init_adapter(lora.required(self.lora), params, key)

    def merge(self, params: Adapted) -> PyTree:
        """Merge the adapter into plain parameters; see `lora.merge`."""
        return lora.merge(params.base, params.adapter, lora.required(self.lora))

    def sequence_stats(
        self, params: PyTree, batch: TokenBatch, *, dropout_keys: Key[Array, "B"] | None = None
    ) -> TokenStats:
        """Statistics of tokens 1 .. S-1 of each sequence, given the tokens before it: arrays [B, S-1].

        For a packed batch, those of the trained tokens; 0 at the others.
        """
        hidden = self._hidden(params, batch, dropout_keys)
        if batch.packing is None:
            return self.hidden_stats(params, hidden[:, :-1], batch.tokens[:, 1:], temperature=1.0)
        trained, first = batch.loss_mask[:, 1:], jnp.ones(len(batch.tokens), jnp.int32)
        hidden = packing.predictors(hidden, first, trained, batch.packing)
        tokens = packing.targets(batch.tokens[:, 1:], batch.packing)
        stats = self.hidden_stats(params, hidden, tokens, temperature=1.0)
        return TokenStats(*(packing.by_token(leaf, trained, batch.packing) for leaf in stats))

    def response_stats(
        self, params: PyTree, sequences: Sequences, *, temperature: float, dropout_keys: Key[Array, "B"] | None = None
    ) -> TokenStats:
        """Statistics of each response token given the prompt and the tokens before it: arrays [B, T].

        The distribution is softmax(logits / temperature), from which responses are sampled.
        """
        hidden = self.response_hidden(params, sequences, dropout_keys=dropout_keys)
        return self.stats_of_responses(params, hidden, sequences, temperature=temperature)

    def response_hidden(
        self, params: PyTree, sequences: Sequences, *, dropout_keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "rows predictions D"]:
        """Hidden state that predicts each response token, computed from the prompt and the tokens before it.

        Arrays [B, T, D], or [G, M, D] for packed rows.
        """
        return predictors(self._hidden(params, sequences, dropout_keys), sequences)

    def stats_of_responses(
        self,
        params: PyTree,
        hidden: Float[Array, "rows predictions D"],
        sequences: Sequences,
        *,
        temperature: float,
        stats_fn: Callable[..., TokenStats] = head.token_stats,
    ) -> TokenStats:
        """Statistics of response tokens from `response_hidden`: arrays [B, T]. Args: stats_fn as in `hidden_stats`."""
        stats = self.hidden_stats(params, hidden, targets(sequences), temperature=temperature, stats_fn=stats_fn)
        return TokenStats(*(by_response(leaf, sequences) for leaf in stats))

    def pair_stats(
        self, params: PyTree, batch: PreferenceBatch, *, dropout_keys: Key[Array, "B"] | None = None
    ) -> tuple[TokenStats, TokenStats]:
        """Statistics of each token of the chosen and the rejected responses, in one forward pass: arrays [B, T]."""
        if dropout_keys is not None:  # separate masks for chosen and rejected
            dropout_keys = jax.vmap(jax.random.split, out_axes=1)(dropout_keys).reshape(-1)
        stats = self.response_stats(params, both_responses(batch), temperature=1.0, dropout_keys=dropout_keys)
        chosen, rejected = zip(*(jnp.split(leaf, 2) for leaf in stats), strict=True)
        return TokenStats(*chosen), TokenStats(*rejected)

    def start(
        self, params: PyTree, tokens: Int[Array, "B P"], mask: Bool[Array, "B P"], slots: int, room: int | None = None
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Prefill: logits of the token after each left-padded prompt, and a cache with `slots` slots in total.

        Args: room is the maximum sequence length, if it exceeds `slots`.
        """
        cache = empty_cache(self.config, tokens.shape[0], slots)
        hidden, cache = self.apply(params, tokens, mask, cache, 0, room, method="extend")
        return self.logits(params, hidden[:, -1]), cache

    def step(
        self,
        params: PyTree,
        tokens: Int[Array, "B"],
        cache: KVCache,
        slot: Int[Array, ""] | int,
        active: Bool[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Decode: write one more token per row to the cache at `slot`, and return the logits of the next one.

        Args: active marks the rows that have a token (None: all). Other rows do not advance, and their logits are
        arbitrary.
        """
        seen = jnp.ones(tokens.shape[0], bool) if active is None else active
        hidden, cache = self.apply(params, tokens[:, None], seen[:, None], cache, slot, method="extend")
        return self.logits(params, hidden[:, 0]), cache

    def extend(
        self,
        params: PyTree,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        cache: KVCache,
        slot: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Continue a prefill: write S more right-padded tokens to the cache from `slot`; logits of the next token."""
        hidden, cache = self.apply(params, tokens, mask, cache, slot, method="extend")
        last = jnp.sum(mask, axis=1, dtype=jnp.int32) - 1
        return self.logits(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), cache

    @property
    def _body(self) -> Transformer:
        return Transformer(self.config, self.vocab_size)

    def _hidden(
        self, params: PyTree, batch: TokenBatch | Sequences, dropout_keys: Key[Array, "B"] | None
    ) -> Float[Array, "rows width D"]:
        rows, keys = reading(batch, dropout_keys)
        return self.apply(params, *rows, dropout_keys=keys)

    def apply(
        self, params: PyTree, *args: Any, method: str | None = None, dropout_keys: Key[Array, "B"] | None = None
    ) -> Any:
        """Run the transformer body with the adapter, if any: hidden states, and the cache if `method` is "extend"."""
        return lora.apply(self._body, params, self.lora, *args, method=method, dropout_keys=dropout_keys)

    @property
    def allowed(self) -> Bool[Array, "V"]:
        """Mask of the tokens that the policy may emit."""
        return jnp.ones(self.vocab_size, bool).at[jnp.array(self.suppressed, jnp.int32)].set(False)

    def logits(self, params: PyTree, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Logits of hidden states; suppressed tokens get `head.MASKED_LOGIT`, so that their probability is 0."""
        weights = self._head(params).astype(self.config.compute_dtype)
        return head.logits(hidden, weights, self.allowed, softcap=self.config.logit_softcap)

    def hidden_stats(
        self,
        params: PyTree,
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        *,
        temperature: float,
        stats_fn: Callable[..., TokenStats] = head.token_stats,
    ) -> TokenStats:
        """Statistics of tokens, from the hidden states that predict them.

        Args: stats_fn is `head.token_stats`, or `head.token_stats_with_entropy` for losses with an entropy term.
        """
        return stats_fn(
            hidden,
            self._head(params),
            self.allowed,
            tokens,
            temperature=temperature,
            softcap=self.config.logit_softcap,
        )

    def _head(self, params: PyTree) -> Float[Array, "V D"]:
        params = params.base if isinstance(params, Adapted) else params  # adapters do not change the head
        return params["embedding" if self.config.tied else "head"]


def both_responses(batch: PreferenceBatch) -> Sequences:
    """Stack the pairs of a batch into 2B rows: all chosen responses, then all rejected ones."""
    return jax.tree.map(lambda *sides: jnp.concatenate(sides), batch.chosen, batch.rejected)


@functools.partial(jax.jit, static_argnums=0)  # compiled once per architecture
def _init(body: Transformer, key: PRNGKeyArray) -> PyTree:
    return body.init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))["params"]
