# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Drives every preference loss of TRL 1.16's trainers (DPO, KTO, CPO, ORPO) on one random batch with padding.

Each loss is written down with its gradient by every token's log-probability. The prompts have one token, because TRL's
ORPO would learn longer ones as well, and the padding is on the right.
"""

import copy
import functools
import tempfile
from typing import Any

import datasets
import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from tests.parity import tiny

VERSION = "1.16.0"
BETA = 0.3
ROWS, WIDTH = 8, 11  # four pairs: the chosen responses, then the rejected ones

# The names are those of tests.support.against_trl.
DPO: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name]} for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair")},
    **{name: {"loss_type": [name]} for name in ("sppo_hard", "apo_zero", "apo_down", "discopop", "sft")},
    **{name: {"loss_type": [name], "label_smoothing": 0.1} for name in ("robust", "exo_pair", "aot", "aot_unpaired")},
    "discopop, tau": {"loss_type": ["discopop"], "discopop_tau": 0.7},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence, ipo": {"f_divergence_type": "js_divergence", "loss_type": ["ipo"]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "desensitised": {"ld_alpha": 0.4},
    "desensitised, sft": {"ld_alpha": 0.4, "loss_type": ["ipo", "sft"], "loss_weights": [0.2, 0.5]},
    "use_weighting": {"use_weighting": True, "loss_type": ["ipo"]},
    "mixture": {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.8, 1.0, 0.2]},
}
CPO: dict[str, dict[str, Any]] = {
    "cpo": {"loss_type": "sigmoid", "cpo_alpha": 0.6},
    "cpo, smoothed": {"loss_type": "sigmoid", "label_smoothing": 0.1},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.7, "simpo_gamma": 0.4, "label_smoothing": 0.1},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4, "label_smoothing": 0.1},
}
KTO: dict[str, dict[str, Any]] = {
    "kto": {"loss_type": "kto"},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.7}


@functools.cache
def record(seed: int) -> dict[str, np.ndarray]:
    assert trl.__version__ == VERSION
    torch.manual_seed(seed)
    models = tiny.language_model(), tiny.language_model()
    batch = _batch(seed)
    found: dict[str, Any] = {"completion_mask": batch["completion_mask"].bool()}
    for name, settings in DPO.items():  # trainers alter the models that they are given
        found |= _of_dpo(name, settings, *copy.deepcopy(models), batch)
    for name, settings in CPO.items():
        found |= _of_logits(name, CPOTrainer, CPOConfig, settings, copy.deepcopy(models[0]), batch)
    found |= _of_logits("orpo", ORPOTrainer, ORPOConfig, {}, copy.deepcopy(models[0]), batch)
    for name, settings in KTO.items():
        found |= _of_kto(name, settings, *copy.deepcopy(models), batch, seed)
    return {
        name: value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float32)
        for name, value in found.items()
    }


def synchronised(policy: np.ndarray, reference: np.ndarray, alpha: float) -> np.ndarray:
    """Apply TR-DPO's callback to one weight of the reference."""
    own, theirs = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    own.weight.data, theirs.weight.data = torch.tensor(policy), torch.tensor(reference)
    SyncRefModelCallback._sync_target_model(own, theirs, alpha)
    return theirs.weight.detach().numpy()


def _batch(seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    end = rng.integers(2, WIDTH + 1, size=(ROWS, 1))
    columns = np.arange(WIDTH)[None, :]
    tokens = rng.integers(2, tiny.VOCABULARY, size=(ROWS, WIDTH))
    return {
        "input_ids": torch.as_tensor(np.where(columns < end, tokens, tiny.PAD)),
        "attention_mask": torch.as_tensor(columns < end).long(),
        "completion_mask": torch.as_tensor((columns >= 1) & (columns < end)).long(),
    }


def _trainer(trainer: Any, config: Any, settings: dict[str, Any], columns: dict[str, Any], **models: Any) -> Any:
    rows = {name: [value] * 2 for name, value in columns.items()}
    with tempfile.TemporaryDirectory() as folder:
        return trainer(
            args=config(folder, use_cpu=True, bf16=False, report_to=[], beta=BETA, **settings),
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tiny.tokenizer(),
            **models,
        )


def _of_dpo(name: str, settings: dict[str, Any], policy: Any, reference: Any, batch: Any) -> dict[str, Any]:
    columns = {"prompt": "w2 w3", "chosen": "w4", "rejected": "w5"}
    trainer = _trainer(trl.DPOTrainer, trl.DPOConfig, settings, columns, model=policy.train(), ref_model=reference)
    own, ref = _outputs(policy), _outputs(reference)
    loss = trainer._compute_loss(policy, dict(batch), return_outputs=False)
    loss.backward()
    found = {f"{name}/loss": loss, f"{name}/grad": own[-1].log_probs.grad}
    if name == "sigmoid":
        found |= {"logprobs": own[-1].log_probs, "ref_logprobs": ref[-1].log_probs}
    if name == "use_weighting":
        found["log_sum_sq_probs"] = own[-1].log_sum_sq_probs
    return found


def _of_kto(name: str, settings: dict[str, Any], policy: Any, reference: Any, batch: Any, seed: int) -> dict[str, Any]:
    columns = {"prompt": "w2 w3", "completion": "w4", "label": True}
    settings = {"per_device_train_batch_size": 2, **settings, **WEIGHTS}
    trainer = _trainer(trl.KTOTrainer, trl.KTOConfig, settings, columns, model=policy.train(), ref_model=reference)
    own = _outputs(policy)
    labels = torch.as_tensor(np.random.default_rng(seed).permutation([1, 1, 1, 0, 0, 0, 0, 0])).bool()
    mismatched = {f"KL_{key}": value.flip(0) for key, value in batch.items()}
    loss = trainer._compute_loss(policy, {**batch, **mismatched, "label": labels}, return_outputs=False)
    loss.backward()
    trained = next(out for out in own if out.log_probs.grad is not None)
    metrics = trainer._metrics["train"]
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl")
    return {
        f"{name}/loss": loss,
        f"{name}/grad": trained.log_probs.grad,
        "label": labels,
        **{f"{name}/{key}": metrics[key][-1] for key in names},
    }


def _of_logits(name: str, kind: Any, config: Any, settings: dict[str, Any], policy: Any, batch: Any) -> dict[str, Any]:
    """Trainers that compute log-probabilities of logits themselves: the gradient by them is read off the logits'."""
    columns = {"prompt": "w2 w3", "chosen": "w4", "rejected": "w5"}
    settings = {"remove_unused_columns": False, **settings}
    trainer = _trainer(kind, config, settings, columns, model=policy.train())
    outputs = []
    policy.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    sides = {}
    for key, value in {**batch, "labels": labels}.items():
        sides[f"chosen_{key}"], sides[f"rejected_{key}"] = value.chunk(2)
    loss, _ = trainer.get_batch_loss_metrics(policy, sides)
    (d_logits,) = torch.autograd.grad(loss, outputs[-1].logits)
    d_logits, softmax = d_logits[:, :-1], outputs[-1].logits[:, :-1].softmax(-1)
    one_hot = torch.nn.functional.one_hot(batch["input_ids"][:, 1:], tiny.VOCABULARY)
    direction = one_hot - softmax  # of the derivative of a log-probability
    grad = (d_logits * one_hot).sum(-1) / (direction * one_hot).sum(-1)
    torch.testing.assert_close(d_logits, grad[..., None] * direction, rtol=1e-4, atol=1e-6)
    return {f"{name}/loss": loss, f"{name}/grad": grad}


def _outputs(model: Any) -> list[Any]:
    """Record the output of each call of a model, and keep the gradient of its log-probabilities."""
    kept = []

    def hook(module, inputs, output):
        if output.log_probs.requires_grad:
            output.log_probs.retain_grad()
        kept.append(output)

    model.register_forward_hook(hook)
    return kept
