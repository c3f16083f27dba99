"""Load checkpoints of language models and reward models for use from Python, by default in float32."""

from pathlib import Path

from rlhf_jax.config import FunctionSource
from rlhf_jax.loading.models import Policy, RewardModel, Tuning, load_checkpoint
from rlhf_jax.models.model_config import DType
from rlhf_jax.types import RlhfError


def load_policy(source: str | Path, *, dtype: DType = "float32", family: str | None = None) -> Policy:
    """Load a language model with its tokenizer.

        policy = load_policy("smollm2")

    Args:
        source: a directory with a Hugging Face checkpoint, an exported model or a PEFT adapter (merged into its base),
            a GGUF file, OWNER/NAME on the hub, or `smollm2`. For a stage's policy use `Run.load_policy`.
        dtype: dtype of parameters and computation.

    Raises RlhfError if there is no model, its family is not supported, or it is a reward model.
    """
    model = load_checkpoint(str(source), _tuning(dtype, family))
    if not isinstance(model, Policy):
        raise RlhfError(f"{source} is a reward model, not a language model: use load_reward_model")
    return model


def load_reward_model(source: str | Path, *, dtype: DType = "float32", family: str | None = None) -> RewardModel:
    """Load a reward model, a classifier with one label, with its tokenizer; arguments as for `load_policy`.

        reward_model = load_reward_model("path/to/classifier")

    Raises RlhfError if there is no model, its family is not supported, or it is a language model.
    """
    model = load_checkpoint(str(source), _tuning(dtype, family))
    if not isinstance(model, RewardModel):
        raise RlhfError(f"{source} is a language model, not a reward model: use load_policy")
    return model


def _tuning(dtype: DType, family: str | None) -> Tuning:
    return Tuning(param_dtype=dtype, compute_dtype=dtype, family=None if family is None else FunctionSource(family))
