"""Policy losses and advantage estimators by name: those of `core`, and functions from a user's file or module.

Arrays are [B, T], with one row per response; the responses to one prompt are consecutive.
"""

from jaxtyping import Array

from rlhf_jax import user_code
from rlhf_jax.core.advantages import CRITIC_FREE, AdvantageSpec
from rlhf_jax.core.policy_losses import OPTIONS, POLICY_LOSSES, PolicyLossSpec, TokenLosses
from rlhf_jax.types import RlhfError


def find_policy_loss(source: str) -> PolicyLossSpec:
    """Look up a loss of `POLICY_LOSSES`, or load `my_loss(logprobs, old_logprobs, advantages, response_mask, *, ...)`.

    A user's loss returns `TokenLosses`. Its keyword parameters may be any options of the losses in `POLICY_LOSSES`
    (`clip_ratio`, ...); their values come from the config. Raises RlhfError for another signature.
    """
    if source in POLICY_LOSSES:
        return POLICY_LOSSES[source]
    function = user_code.load(source, "policy loss")
    arguments = ("logprobs", "old_logprobs", "advantages", "response_mask")
    options = user_code.options_of(function, source, "policy loss", arguments=arguments, options=OPTIONS)

    def policy_loss(
        logprobs: Array, old_logprobs: Array, advantages: Array, response_mask: Array, **given: float
    ) -> TokenLosses:
        found = function(logprobs, old_logprobs, advantages, response_mask, **given)
        if not isinstance(found, TokenLosses) or any(part.shape != logprobs.shape for part in found):
            raise RlhfError(
                f"policy loss {source} returned {_shape(found)} for log-probabilities of shape {logprobs.shape}: "
                "return rlhf_jax.core.policy_losses.TokenLosses(losses, clipped), two arrays of that shape"
            )
        return found

    return PolicyLossSpec(policy_loss, options)


def find_advantage(source: str) -> AdvantageSpec:
    """Look up an estimator of `CRITIC_FREE`, or load a user's `my_advantage(rewards, response_mask, *, ...)`.

    A user's estimator returns one advantage per token. It may have the keyword parameters `num_generations` (groups
    must then have at least two responses), `axes` (the mapped axes that rows are split over) and `gamma`. Raises
    RlhfError for another signature.
    """
    if source in CRITIC_FREE:
        return CRITIC_FREE[source]
    function = user_code.load(source, "advantage estimator")
    options = user_code.options_of(
        function,
        source,
        "advantage estimator",
        arguments=("rewards", "response_mask"),
        options=("num_generations", "axes", "gamma"),
    )

    def advantage(rewards: Array, response_mask: Array, **given: object) -> Array:
        found = function(rewards, response_mask, **{name: given[name] for name in options})
        if getattr(found, "shape", None) != rewards.shape:
            raise RlhfError(
                f"advantage estimator {source} returned {_shape(found)} for rewards of shape {rewards.shape}: return "
                "one advantage for each token, in an array of that shape"
            )
        return found

    return AdvantageSpec(advantage, needs_groups="num_generations" in options, discounted="gamma" in options)


def _shape(found: object) -> str:
    shape = getattr(found, "shape", None)
    return f"a {type(found).__name__}" if shape is None else f"an array of shape {shape}"
