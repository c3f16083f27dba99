"""Policy losses and advantage estimators: those of `core`, by name, and a user's own, from a file or a module.

Arrays are [B, T]: a row for each response, the responses to a prompt next to each other.
"""

from jaxtyping import Array

from rlhf_jax import user_code
from rlhf_jax.core.advantages import CRITIC_FREE, AdvantageSpec
from rlhf_jax.core.policy_losses import OPTIONS, POLICY_LOSSES, PolicyLossSpec, TokenLosses
from rlhf_jax.types import RlhfError


def find_policy_loss(source: str) -> PolicyLossSpec:
    """Look up a loss of `POLICY_LOSSES`, or load `my_loss(logprobs, old_logprobs, advantages, response_mask, *, ...)`.

    A user's loss returns `TokenLosses`. It may have any option of the losses in `POLICY_LOSSES` as a keyword parameter
    (`clip_ratio`, ...), and is then given the config's. Raises RlhfError for another signature.
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
                "return TokenLosses(losses, clipped), of rlhf_jax.core.policy_losses, two arrays of that shape"
            )
        return found

    return PolicyLossSpec(policy_loss, options)


def find_advantage(source: str) -> AdvantageSpec:
    """Look up an estimator of `CRITIC_FREE`, or load a user's `my_advantage(rewards, response_mask, *, ...)`.

    It returns one advantage a token. As keyword parameters it may have `num_generations`, for which groups must have
    two responses or more, `axes`, the mapped axes that rows are split over, and `gamma`. Raises RlhfError for another
    signature.
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
