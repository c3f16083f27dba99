"""Load checkpoints for use from Python: language models and reward models, in float32 unless told otherwise."""

from pathlib import Path

from rlhf_jax.loading.models import Policy, RewardModel, Tuning, load_checkpoint
from rlhf_jax.models.model_config import DType
from rlhf_jax.types import RlhfError


def load_policy(source: str | Path, *, dtype: DType = "float32") -> Policy:
    """Load a language model with its tokenizer.

        policy = load_policy("smollm2")

    Args:
        source: a Hugging Face directory, a directory that `export` wrote, a PEFT adapter's (merged into its base), a
            GGUF file, OWNER/NAME on the hub, or `smollm2`. `Run.load_policy` loads a stage's policy.
        dtype: of parameters and computation.

    Raises RlhfError where there is no model, where its family is not covered, and for a reward model.
    """
    model = load_checkpoint(str(source), Tuning(param_dtype=dtype, compute_dtype=dtype))
    if not isinstance(model, Policy):
        raise RlhfError(f"{source} is a reward model where a language model is needed: load it by load_reward_model")
    return model


def load_reward_model(source: str | Path, *, dtype: DType = "float32") -> RewardModel:
    """Load a reward model, a classifier with one label, with its tokenizer; sources as for `load_policy`.

        reward_model = load_reward_model("path/to/classifier")

    Raises RlhfError where there is no model, where its family is not covered, and for a language model.
    """
    model = load_checkpoint(str(source), Tuning(param_dtype=dtype, compute_dtype=dtype))
    if not isinstance(model, RewardModel):
        raise RlhfError(f"{source} is a language model where a reward model is needed: load it by load_policy")
    return model
