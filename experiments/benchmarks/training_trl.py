# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""TRL's side of the training benchmark: its trainers on the same rows of token ids, by their own `train()`.

PPO needs TRL 1.12, the last with a PPOTrainer. `grouped` as a second argument has the trainer group rows by length.
"""

import contextlib
import importlib.metadata
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from experiments.benchmarks.training_turns import BETA, KL_COEF, LEARNING_RATE, Finished, Turns, Work, read_work, score

CLASSIFIER = transformers.AutoModelForSequenceClassification
PPO_EPSILON = 1e-5


class Clock(transformers.TrainerCallback):
    """Callback that counts steps and their tokens, from TRL's log of each step."""

    def __init__(self, turns: Turns, work: Work) -> None:
        """Count no step yet."""
        self.tokens: list[float] = []
        self.sampled = 0  # response tokens since the last step of PPO, which does not log them
        self._turns, self._work = turns, work

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step: response tokens of a method that samples, all tokens of any other."""
        logs = kwargs["logs"]
        if self._work.kind == "ppo":
            self.tokens.append(self.sampled)
            self.sampled = 0
        elif self._work.kind == "grpo":
            self.tokens.append(round(self._work.batch * logs["completions/mean_length"]))
        else:
            self.tokens.append(logs["num_tokens"] - sum(self.tokens))
        self._turns.step()


def arguments(work: Work, folder: str) -> dict[str, Any]:
    """Arguments of every trainer."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": work.batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
    }


def policy(work: Work) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32)


def reward_model(work: Work) -> Any:
    return CLASSIFIER.from_pretrained(work.reward_model, dtype=torch.float32)


def offline(work: Work, pairs: list[dict[str, Any]], common: dict[str, Any], *, grouped: bool) -> Any:
    """Make the trainer of a table of token ids, which skips TRL's tokenisation."""
    model = reward_model(work) if work.kind == "reward_model" else policy(work)
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
        "reward_model": (trl.RewardTrainer, trl.RewardConfig, {}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"beta": BETA}),
        "kto": (trl.KTOTrainer, trl.KTOConfig, {"beta": BETA}),
    }
    trainer_class, config_class, settings = kinds[work.kind]

    class Trainer(trainer_class):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    if work.kind != "kto":  # its KL estimate needs the order of the rows
        settings["train_sampling_strategy"] = "group_by_length" if grouped else "random"
    config = config_class(
        **common, **settings, max_length=None, num_train_epochs=work.rounds + 1, remove_unused_columns=False
    )
    return Trainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows_of(work, pairs)),
        processing_class=transformers.AutoTokenizer.from_pretrained(work.policy),
    )


def rows_of(work: Work, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as TRL's data collators read them, with the `length` by which they are grouped."""
    if work.kind == "kto":
        sides = [(pair["prompt"], pair[side], side == "chosen") for pair in pairs for side in ("chosen", "rejected")]
        random.Random(0).shuffle(sides)
        before = [sides[i - i % work.batch + (i - 1) % work.batch][1] for i in range(len(sides))]
        return [
            {"prompt_ids": prompt, "completion_ids": completion, "KL_completion_ids": other, "label": label}
            for (prompt, completion, label), other in zip(sides, before, strict=True)
        ]
    rows = []
    for pair in pairs:
        prompt, chosen, rejected = (pair[name] for name in ("prompt", "chosen", "rejected"))
        length = len(prompt) + max(len(chosen), len(rejected))
        if work.kind == "sft":
            labels, length = [-100] * len(prompt) + chosen, len(prompt) + len(chosen)
            rows.append({"input_ids": prompt + chosen, "labels": labels, "length": length})
        elif work.kind == "reward_model":
            rows.append({"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "length": length})
        else:
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length})
    return rows


def grpo(work: Work, pairs: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    """Make the trainer of GRPO, which reads the prompts as texts."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(work.policy)
    texts = [pair["text"] for pair in pairs]
    if tokenizer(texts)["input_ids"] != [pair["prompt"] for pair in pairs]:
        raise SystemExit("TRL would read other prompts than our stages: --prompt cuts some off")
    config = trl.GRPOConfig(
        **common,
        num_train_epochs=work.rounds + 1,
        num_generations=work.group,
        max_completion_length=work.response,
        beta=KL_COEF,
        steps_per_generation=1,
    )
    return trl.GRPOTrainer(
        model=policy(work),
        reward_funcs=score,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
    )


def ppo(work: Work, pairs: list[dict[str, Any]], common: dict[str, Any], clock: Clock) -> Any:
    """Make the trainer of PPO, and count the tokens of its responses up to EOS."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    truncate = ppo_trainer.truncate_response

    def counted(stop_token_id: int, pad_token_id: int, responses: Any) -> Any:
        truncated = truncate(stop_token_id, pad_token_id, responses)
        clock.sampled += int((truncated != pad_token_id).sum())
        return truncated

    ppo_trainer.truncate_response = counted
    config = PPOConfig(
        **common,
        total_episodes=work.batch * work.steps * (work.rounds + 1),
        num_mini_batches=1,
        num_ppo_epochs=1,
        response_length=work.response,
        local_rollout_forward_batch_size=work.batch,
        stop_token="eos",
        temperature=1.0,
        missing_eos_penalty=None,
        num_sample_generations=0,
        kl_coef=KL_COEF,
        adam_epsilon=PPO_EPSILON,
    )
    return PPOTrainer(
        args=config,
        processing_class=transformers.AutoTokenizer.from_pretrained(work.policy, padding_side="left"),
        model=policy(work),
        ref_model=policy(work),
        reward_model=reward_model(work),
        value_model=reward_model(work),
        train_dataset=datasets.Dataset.from_dict({"input_ids": [pair["prompt"] for pair in pairs]}),
    )


def main() -> None:
    """Train until the last round, and report tokens and packages."""
    work = read_work()
    turns = Turns(work)
    torch.set_num_threads(work.threads)
    transformers.logging.set_verbosity_error()
    pairs = [json.loads(line) for line in Path(work.ids).read_text().splitlines()]
    clock = Clock(turns, work)
    with tempfile.TemporaryDirectory() as folder:
        common = arguments(work, folder)
        if work.kind == "ppo":
            trainer = ppo(work, pairs, common, clock)
        elif work.kind == "grpo":
            trainer = grpo(work, pairs, common)
        else:
            trainer = offline(work, pairs, common, grouped=sys.argv[2:] == ["grouped"])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(clock)
        with contextlib.suppress(Finished):
            trainer.train()
    packages = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers", "accelerate")}
    turns.report(tokens=turns.per_round(clock.tokens), compile_seconds=0.0, packages=packages)


if __name__ == "__main__":
    main()
