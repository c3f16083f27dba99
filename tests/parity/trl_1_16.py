# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Drives the loss functions of TRL 1.16's own trainers on random batches with padding on both sides."""

import functools
import tempfile
from typing import Any

import datasets
import numpy as np
import torch
import trl

from tests.parity import tiny

VERSION = "1.16.0"
BETA = 0.3
CENTER_REWARDS_COEFFICIENT = 0.2
ROWS, WIDTH = 8, 11


def _batch(seed: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts, right-padded completions, all of different lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, tiny.VOCABULARY, size=(ROWS, WIDTH))
    start = rng.integers(0, 3, size=(ROWS, 1))  # the first token of the prompt
    middle = rng.integers(4, 6, size=(ROWS, 1))  # the first token of the completion
    end = rng.integers(6, WIDTH + 1, size=(ROWS, 1))
    columns = np.arange(WIDTH)[None, :]
    real = (columns >= start) & (columns < end)
    return {
        "input_ids": torch.as_tensor(np.where(real, tokens, tiny.PAD)),
        "attention_mask": torch.as_tensor(real).long(),
        "completion_mask": torch.as_tensor((columns >= middle) & (columns < end)).long(),
    }


def _trainer(
    kind: str,
    model: torch.nn.Module,
    columns: dict[str, str],
    settings: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    assert trl.__version__ == VERSION
    trainers = {"dpo": (trl.DPOTrainer, trl.DPOConfig), "sft": (trl.SFTTrainer, trl.SFTConfig)}
    trainer, config = {**trainers, "reward": (trl.RewardTrainer, trl.RewardConfig)}[kind]
    settings = settings or ({"beta": BETA} if kind == "dpo" else {})
    with tempfile.TemporaryDirectory() as folder:
        return trainer(
            model=model.train(),
            args=config(folder, use_cpu=True, bf16=False, report_to=[], **settings),
            train_dataset=datasets.Dataset.from_dict({name: [text] for name, text in columns.items()}),
            processing_class=tiny.tokenizer(),
            **arguments,
        )


def _keep_hidden(model: torch.nn.Module) -> list[torch.Tensor]:
    """Record the head's input at each call, and keep its gradient."""
    kept = []

    def hook(module, inputs, output):
        if output.requires_grad:
            output.retain_grad()
        kept.append(output)

    model.model.norm.register_forward_hook(hook)
    return kept


def _numpy(found: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float32)
        for name, value in found.items()
    }


@functools.cache
def record_dpo(seed: int) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    policy, reference = tiny.language_model(), tiny.language_model()
    columns = {"prompt": "w2 w3", "chosen": "w4", "rejected": "w5"}
    trainer = _trainer("dpo", policy, columns, ref_model=reference)
    hidden, ref_hidden = _keep_hidden(policy), _keep_hidden(reference)
    batch = _batch(seed)
    loss = trainer._compute_loss(policy, batch, return_outputs=False)
    loss.backward()
    metrics = trainer._metrics["train"]
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    return _numpy(
        {
            "tokens": batch["input_ids"],
            "completion_mask": batch["completion_mask"].bool(),
            "hidden": hidden[0],
            "head": policy.lm_head.weight,
            "ref_hidden": ref_hidden[0],
            "ref_head": reference.lm_head.weight,
            "loss": loss,
            "hidden_grad": hidden[0].grad,
            "head_grad": policy.lm_head.weight.grad,
            **{name: metrics[name][-1] for name in (*names, "logps/chosen", "logps/rejected")},
        }
    )


@functools.cache
def record_sft(seed: int) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    model = tiny.language_model()
    trainer = _trainer("sft", model, {"text": "w2 w3"})
    hidden = _keep_hidden(model)
    batch = _batch(seed)
    completion = batch.pop("completion_mask").bool()
    labels = batch["input_ids"].masked_fill(~completion, -100)
    loss = trainer.compute_loss(model, {**batch, "labels": labels})
    loss.backward()
    metrics = trainer._metrics["train"]
    return _numpy(
        {
            "tokens": batch["input_ids"],
            "completion_mask": completion,
            "hidden": hidden[0],
            "head": model.lm_head.weight,
            "loss": loss,
            "hidden_grad": hidden[0].grad,
            "head_grad": model.lm_head.weight.grad,
            "entropy": metrics["entropy"][-1],
        }
    )


@functools.cache
def record_reward(seed: int) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    model = tiny.score_model()
    trainer = _trainer("reward", model, {"chosen": "w2 w3", "rejected": "w4"})
    scores = []
    model.register_forward_hook(lambda module, inputs, output: scores.append(output.logits))
    batch = _batch(seed)
    del batch["completion_mask"]
    loss = trainer.compute_loss(model, batch)
    scores[0].retain_grad()
    loss.backward()
    chosen, rejected = scores[0].squeeze(-1).chunk(2)
    chosen_grad, rejected_grad = scores[0].grad.squeeze(-1).chunk(2)
    metrics = trainer._metrics["train"]
    names = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    return _numpy(
        {
            "chosen_scores": chosen,
            "rejected_scores": rejected,
            "loss": loss,
            "chosen_grad": chosen_grad,
            "rejected_grad": rejected_grad,
            **{name: metrics[name][-1] for name in names},
        }
    )


@functools.cache
def record_centered_reward(seed: int) -> dict[str, np.ndarray]:
    """RewardTrainer on data with a column `margin`, and with a penalty on the mean of scores."""
    torch.manual_seed(seed)
    model = tiny.score_model()
    settings = {"center_rewards_coefficient": CENTER_REWARDS_COEFFICIENT}
    trainer = _trainer("reward", model, {"chosen": "w2 w3", "rejected": "w4"}, settings)
    scores = []
    model.register_forward_hook(lambda module, inputs, output: scores.append(output.logits))
    batch = _batch(seed)
    del batch["completion_mask"]
    margin = torch.as_tensor(np.random.default_rng(seed).uniform(0, 2, ROWS // 2), dtype=torch.float32)
    loss = trainer.compute_loss(model, {**batch, "margin": margin})
    scores[0].retain_grad()
    loss.backward()
    chosen, rejected = scores[0].squeeze(-1).chunk(2)
    chosen_grad, rejected_grad = scores[0].grad.squeeze(-1).chunk(2)
    return _numpy(
        {
            "chosen_scores": chosen,
            "rejected_scores": rejected,
            "margins": margin,
            "loss": loss,
            "chosen_grad": chosen_grad,
            "rejected_grad": rejected_grad,
        }
    )
