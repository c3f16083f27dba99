"""`rlhf-jax export`: a model as a directory that transformers loads."""

import json
import tempfile
from pathlib import Path

from rlhf_jax.models import hf
from rlhf_jax.models.description import describe
from rlhf_jax.stages.models import AS_IT_IS, Policy, RewardModel
from rlhf_jax.text.pretrained import GENERATION_FILE, as_pretrained, suppression
from rlhf_jax.types import RlhfError
from rlhf_jax.verbs import options as flags

DESCRIPTION = """\
Writes a policy or a reward model, with its tokenizer and chat template, as transformers loads them:
AutoModelForCausalLM (or AutoModelForSequenceClassification) and AutoTokenizer. The directory appears whole or not at
all. Weights keep the type they have, or are written in that of --dtype.
"""


def export_verb(arguments: list[str]) -> None:
    """Writes a model for others to load."""
    parser = flags.Parser("rlhf-jax export", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a directory that is not there yet")
    options = parser.parse_args(arguments)
    if options.out.exists():
        raise RlhfError(f"--out={options.out} is there already: name a new directory, or remove it")
    model = flags.load_model(options, AS_IT_IS)
    export(model, options.out)
    print(options.out)


def export(model: Policy | RewardModel, out: Path) -> None:
    """Writes a model, one from scratch as a checkpoint of a family that has its shape; whole or not at all.

    Raises RlhfError for a shape that no family has, and for a reward model that transformers would read otherwise.
    """
    if isinstance(model, RewardModel) and model.network.ensemble is not None:
        raise RlhfError(
            f"the reward model is an ensemble of {model.network.ensemble.members}, and a checkpoint holds one model: "
            "export a stage that trained one"
        )
    if isinstance(model, RewardModel) and model.network.pooling != "last":
        raise RlhfError(
            f"the reward model reads its score with pooling = {model.network.pooling!r}, and transformers' classifiers "
            "read the last token: its scores would be others there. Train it with pooling = 'last'"
        )
    model = described(model)
    assert model.hf_config is not None
    kind: hf.Kind = "policy" if isinstance(model, Policy) else "reward"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            partial = Path(temporary) / out.name
            hf.save_pretrained(partial, kind, model.params, model.hf_config)
            model.tokenizer.save(partial)
            if isinstance(model, Policy):
                _write_generation_config(model, partial)
            partial.rename(out)
    except OSError as error:
        raise RlhfError(f"{out} cannot be written: {error.strerror or error}. Nothing was left there") from error


def described(model: Policy | RewardModel) -> Policy | RewardModel:
    """A model from scratch as a checkpoint would be; others are given back. Raises RlhfError where no family has it."""
    if model.hf_config is not None:
        return model
    tokenizer = as_pretrained(model.tokenizer)
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    hf_config = describe(model.network.config, model.network.vocab_size, **ids)
    if isinstance(model, RewardModel):
        hf_config = hf.classifier_config(hf_config, pad_id=tokenizer.pad_id)
    return model._replace(tokenizer=tokenizer, hf_config=hf_config)


def _write_generation_config(policy: Policy, directory: Path) -> None:
    """What ends a response (more than the tokenizer's own EOS, where chats end otherwise), and what is never in one."""
    stops, start = policy.tokenizer.stop_ids, (policy.hf_config or {}).get("bos_token_id")
    content = {"eos_token_id": list(stops) if len(stops) > 1 else stops[0], "pad_token_id": policy.tokenizer.pad_id}
    content |= {} if start is None else {"bos_token_id": start}
    content |= suppression(policy.network.suppressed)
    (directory / GENERATION_FILE).write_text(json.dumps(content, indent=2) + "\n")
