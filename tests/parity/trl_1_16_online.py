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
SETTINGS = {
    "clip_ratio": 0.1,
    "clip_ratio_high": 0.3,
    "dual_clip": 1.35,
    "kl_coef": 0.2,
    "cap": 1.25,
    "floor": 0.7,
    "max_tokens": WIDTH,
    "num_generations": GROUP,
}
# Their name for a loss, the level of its ratio, and what else is set.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("grpo", "token", {}),
    "dr_grpo": ("dr_grpo", "token", {}),
    "dapo": ("dapo", "token", {}),
    "gspo": ("grpo", "sequence", {}),
    "cispo": ("cispo", "token", {}),
    "sapo": ("sapo", "token", {}),
    "grpo, k3_weighted": ("grpo", "token", {"use_bias_correction_kl": True}),
    "grpo, dual_clip": ("grpo", "token", {"delta": SETTINGS["dual_clip"]}),
}
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


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
                **({"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.4} if kind == "grpo" else {}),
                beta=SETTINGS["kl_coef"],
                **settings,
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w2 w3"] * ROWS}),
            processing_class=tiny.tokenizer(),
        )
    made.model.train()
    made._last_loaded_step = made.state.global_step  # no vLLM to bring weights to
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
    trainer._get_per_token_logps_and_entropies, trainer.reward_funcs = compute, [_reward]
    assert torch.std(found["advantages"]) > 0.1
    return {
        "mask": found["completion_mask"].bool(),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "advantages": found["advantages"],
        **logprobs,
    }


def _weighted(trainer: Any, mode: str, apart: torch.Tensor) -> dict[str, torch.Tensor]:
    """Importance weights for a sampler whose log-probabilities are the learner's less `apart`."""
    lengths = torch.arange(ROWS) % WIDTH + 1
    ids = [[2 + (row + t) % 10 for t in range(length)] for row, length in enumerate(lengths.tolist())]
    found: dict[str, torch.Tensor] = {}
    compute = trainer._get_per_token_logps_and_entropies

    def recording(model, *args, **kwargs):
        result = compute(model, *args, **kwargs)
        found.setdefault("logprobs", result[0])  # first by the learner, then by the reference
        return result

    def roll_out(logprobs: torch.Tensor) -> None:
        sampler = [row[:length].tolist() for row, length in zip(logprobs, lengths, strict=True)]
        answer = {"prompt_ids": [[3, 4]] * ROWS, "completion_ids": ids, "logprobs": sampler}
        trainer.rollout_func = lambda prompts, trainer: answer

    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_max = SETTINGS["cap"]
    trainer.vllm_importance_sampling_clip_min = SETTINGS["floor"]
    trainer._get_per_token_logps_and_entropies = recording
    inputs = [{"prompt": "w3 w4"}] * ROWS
    roll_out(torch.zeros(ROWS, WIDTH))
    trainer._generate_and_score_completions(inputs)
    roll_out(found["logprobs"] - apart)
    made = trainer._generate_and_score_completions(inputs)
    trainer.use_vllm, trainer.rollout_func, trainer._get_per_token_logps_and_entropies = False, None, compute
    mask = made["completion_mask"].bool()
    weights = made["importance_sampling_ratio"].expand(mask.shape)
    return {
        "mask": mask,
        "logprobs": made["old_per_token_logps"],
        "sampler_logprobs": made["sampling_per_token_logps"],
        mode: torch.where(mask, weights, 0),
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
    found["far_logprobs"] = old + 4 * (found["logprobs"] - old)  # ratios that a second clip bounds
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
    for kind, scale in (("dr_grpo", "none"), ("grpo_batch_std", "batch")):
        grpo.scale_rewards = scale
        found |= {f"{kind}_sampled/{name}": value for name, value in _scored(grpo).items()}
    rloo.normalize_advantages = True
    found |= {f"rloo_normalized_sampled/{name}": value for name, value in _scored(rloo).items()}
    apart = 0.3 * normal()
    for mode in MODES:
        found |= {f"importance/{name}": value for name, value in _weighted(grpo, mode, apart).items()}
    for name, (loss_type, level, settings) in VARIANTS.items():
        grpo.loss_type, grpo.importance_sampling_level = loss_type, level
        grpo.args.use_bias_correction_kl = settings.get("use_bias_correction_kl", False)
        grpo.args.delta = settings.get("delta")
        # Its bound for CISPO is the largest weight itself.
        grpo.epsilon_high = SETTINGS["clip_ratio_high"] + (loss_type == "cispo")
        of_loss = _of_loss(grpo, found["far_logprobs" if "delta" in settings else "logprobs"], inputs)
        found |= {f"{name}/{part}": value for part, value in of_loss.items()}
    grpo.loss_type, grpo.use_vllm, grpo.epsilon_high = "grpo", True, SETTINGS["clip_ratio_high"]
    grpo.args.delta = None
    found["weights"] = torch.exp(0.3 * normal())
    of_loss = _of_loss(grpo, found["logprobs"], {**inputs, "importance_sampling_ratio": found["weights"]})
    found |= {f"grpo, weights/{part}": value for part, value in of_loss.items()}
    of_loss = _of_loss(rloo, found["logprobs"], inputs)
    found |= {f"rloo/{part}": value for part, value in of_loss.items()}
    return {name: value.detach().numpy() for name, value in found.items()}
