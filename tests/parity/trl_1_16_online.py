# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Drives GRPOTrainer and RLOOTrainer of TRL 1.16: their advantages of sampled responses, and every variant of the loss.

Log-probabilities are put in where the model's would be, so that gradients are with respect to them.
"""

import functools
import tempfile
from typing import Any

import datasets
import numpy as np
import torch
import trl

from tests.parity import tiny

VERSION = "1.16.0"
ROWS, WIDTH, GROUP = 8, 6, 4
SETTINGS = {"clip_ratio": 0.1, "clip_ratio_high": 0.3, "kl_coef": 0.2, "max_tokens": WIDTH, "num_generations": GROUP}
# Their name for a loss, and the level of its ratio.
VARIANTS = {
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
    "cispo": ("cispo", "token"),
}


def _reward(completions: list[str], **columns: Any) -> list[float]:
    """Not linear in anything, and different for different texts."""
    return [len(text) * 0.1 + 0.7 * np.cos(sum(map(ord, text))) for text in completions]


def _trainer(kind: str, seed: int, **settings: Any) -> Any:
    assert trl.__version__ == VERSION
    torch.manual_seed(seed)
    trainer, config = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}[kind]
    with tempfile.TemporaryDirectory() as folder:
        tiny.language_model().save_pretrained(folder)  # the reference is read from where the model was
        made = trainer(
            model=folder,
            reward_funcs=_reward,
            args=config(
                folder,
                use_cpu=True,
                bf16=False,
                report_to=[],
                seed=seed,
                per_device_train_batch_size=ROWS,
                num_generations=GROUP,
                max_completion_length=WIDTH,
                epsilon=SETTINGS["clip_ratio"],
                epsilon_high=SETTINGS["clip_ratio_high"],
                beta=SETTINGS["kl_coef"],
                **settings,
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w2 w3"] * ROWS}),
            processing_class=tiny.tokenizer(),
        )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    with torch.no_grad():  # away from the reference
        for parameter in made.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def _scored(trainer: Any) -> dict[str, Any]:
    """The trainer's own rollout: two prompts, GROUP responses to each."""
    prompts = ["w2 w3 w4"] * GROUP + ["w5"] * GROUP
    scores, logprobs, compute = [], {}, trainer._get_per_token_logps_and_entropies

    def recording(model, *args, **kwargs):
        result = compute(model, *args, **kwargs)
        logprobs["ref_logprobs" if model is trainer.ref_model else "logprobs"] = result[0]
        return result

    def reward(completions, **columns):
        scores.extend(_reward(completions))
        return scores

    trainer._get_per_token_logps_and_entropies, trainer.reward_funcs = recording, [reward]
    found = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    assert torch.std(found["advantages"]) > 0.1
    return {
        "mask": found["completion_mask"].bool(),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "advantages": found["advantages"],
        **logprobs,
    }


def _of_loss(trainer: Any, logprobs: torch.Tensor, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    logprobs = logprobs.clone().requires_grad_()
    entropies = torch.zeros_like(logprobs)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, entropies, None)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return {"loss": loss.detach(), "grad": logprobs.grad}


@functools.cache
def record(seed: int) -> dict[str, np.ndarray]:
    draw = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(ROWS, WIDTH, generator=draw)

    mask = torch.arange(WIDTH)[None] < torch.randint(1, WIDTH + 1, (ROWS, 1), generator=draw)
    old = -1 - normal().abs()
    found: dict[str, Any] = {
        "mask": mask,
        "old": old,
        "logprobs": old + 0.3 * normal(),
        "ref_logprobs": old + 0.3 * normal(),
        "token_advantages": normal()[:, 0],
    }
    ids = torch.ones(ROWS, WIDTH, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ids[:, :2],
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": found["token_advantages"],
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": found["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    # Not the default of 1.16, which multiplies the penalty by the ratio; the papers do not.
    grpo, rloo = _trainer("grpo", seed, use_bias_correction_kl=False), _trainer("rloo", seed)
    for kind, trainer in (("grpo", grpo), ("rloo", rloo)):
        found |= {f"{kind}_sampled/{name}": value for name, value in _scored(trainer).items()}
    grpo.scale_rewards = "none"
    found |= {f"dr_grpo_sampled/{name}": value for name, value in _scored(grpo).items()}
    for name, (loss_type, level) in VARIANTS.items():
        grpo.loss_type, grpo.importance_sampling_level = loss_type, level
        # Its bound for CISPO is the largest weight itself.
        grpo.epsilon_high = SETTINGS["clip_ratio_high"] + (loss_type == "cispo")
        of_loss = _of_loss(grpo, found["logprobs"], inputs)
        found |= {f"{name}/{part}": value for part, value in of_loss.items()}
    of_loss = _of_loss(rloo, found["logprobs"], inputs)
    found |= {f"rloo/{part}": value for part, value in of_loss.items()}
    return {name: value.detach().numpy() for name, value in found.items()}
