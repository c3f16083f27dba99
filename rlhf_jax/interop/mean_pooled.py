"""Checkpoints of reward models that read the mean hidden state, with a class for transformers beside the weights.

transformers' classifiers read the last token, and have no bias. A directory with this class gives the same scores as
rlhf_jax, where `trust_remote_code=True` allows the class to be loaded.
"""

from pathlib import Path
from typing import Any

from rlhf_jax.interop.families import family_of

ARCHITECTURE = "MeanPooledForSequenceClassification"
FILE = "modeling_mean_pooled.py"
INSTEAD_OF = "mean_pooled_instead_of"
"""Key of config.json with the architecture of transformers' own classifier."""

CODE = '''\
"""Reward model of rlhf_jax: the score reads the mean hidden state of all tokens that are not padding."""

import torch
from transformers import AutoModel, {config}, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class {architecture}(PreTrainedModel):
    """Body of a language model, with a linear head on the mean of its last hidden states."""

    config_class = {config}
    base_model_prefix = "{body}"

    def __init__(self, config):
        super().__init__(config)
        self.{body} = AutoModel.from_config(config)
        self.score = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.{body}(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        mask = torch.ones_like(hidden[..., 0]) if attention_mask is None else attention_mask.to(hidden.dtype)
        pooled = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return SequenceClassifierOutput(logits=self.score(pooled))
'''


def is_mean_pooled(hf_config: dict[str, Any]) -> bool:
    """Return whether a config.json is that of a mean-pooled reward model."""
    return hf_config.get("architectures") == [ARCHITECTURE]


def with_pooling(hf_config: dict[str, Any], pooling: str) -> dict[str, Any]:
    """Change a classifier's config.json to that of a reward model with this pooling."""
    own = dict(hf_config)
    if is_mean_pooled(own):
        own["architectures"] = [own.pop(INSTEAD_OF)]
        own.pop("auto_map")
    if pooling == "last":
        return own
    place = f"{Path(FILE).stem}.{ARCHITECTURE}"
    return own | {
        INSTEAD_OF: own["architectures"][0],
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoModelForSequenceClassification": place},
    }


def write_class(directory: Path, hf_config: dict[str, Any]) -> None:
    """Write the class that config.json names."""
    from transformers import CONFIG_MAPPING  # takes two seconds

    body = family_of(hf_config, "config.json").prefix.rstrip(".")
    config = CONFIG_MAPPING[hf_config["model_type"]].__name__
    code = CODE.format(architecture=ARCHITECTURE, config=config, body=body)
    (directory / FILE).write_text(code, encoding="utf-8")
