# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Whole runs of TRL 1.16's trainers on the checkpoint and the rows of tests.support.curves, by their own `train()`."""

import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from rlhf_jax.loading.pretrained import load_checkpoint
from tests.support import curves, experiments
from tests.support.curves import BETA, SMOOTHING, Curve, World

VERSION = "1.16.0"
CDPO = {
    # TRL 1.16 no longer has conservative DPO (Mitchell 2023) as a loss: "sigmoid" ignores label_smoothing. With L the
    # loss of a pair and M that of the flipped pair, conservative DPO is (1 - e) L + e M and TRL's "robust" is
    # ((1 - e) L - e M) / (1 - 2 e), so this mixture of "sigmoid" and "robust" is conservative DPO.
    "label_smoothing": SMOOTHING,
    "loss_type": ["sigmoid", "robust"],
    "loss_weights": [2 * (1 - SMOOTHING), 2 * SMOOTHING - 1],
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
    "sft_decayed": (trl.SFTTrainer, trl.SFTConfig, {"weight_decay": curves.DECAY}),
    "reward": (trl.RewardTrainer, trl.RewardConfig, {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {"beta": BETA}),
    "ipo": (trl.DPOTrainer, trl.DPOConfig, {"beta": BETA, "loss_type": ["ipo"]}),
    "cdpo": (trl.DPOTrainer, trl.DPOConfig, {"beta": BETA, **CDPO}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {"beta": BETA, **curves.WEIGHTS}),
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": BETA}),
}
WHOLE_BATCH = {
    # TRL averages the losses of micro-batches. For these two that is not the batch's loss: KTO's reference point is a
    # mean over all rows, ORPO's likelihood a mean over all tokens. Our stages accumulate to the loss of the batch, so
    # TRL gets each batch as one micro-batch, and ours are still accumulated over two.
    "kto",
    "orpo",
}


def make_world(directory: Path) -> World:
    """The files of both sides; the models are saved by transformers."""
    world = curves.make_world(directory)
    for place, auto in ((world.policy, transformers.AutoModelForCausalLM), (world.judge, CLASSIFIER)):
        model = auto.from_pretrained(place, dtype=torch.float32)
        (place / "model.safetensors").unlink()
        model.save_pretrained(place)
    return world


CLASSIFIER = transformers.AutoModelForSequenceClassification


def arguments(folder: str, micro_batch: int, ours: dict[str, Any] = curves.OPTIMIZER) -> dict[str, Any]:
    """Arguments of every trainer: the optimiser of our stage, and one log row per step."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "num_train_epochs": 1,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": curves.BATCH // micro_batch,
        "learning_rate": ours["learning_rate"],
        "lr_scheduler_type": ours["schedule"],
        "warmup_steps": ours["warmup_steps"],
        "weight_decay": ours["weight_decay"],
        "adam_beta1": ours["b1"],
        "adam_beta2": ours["b2"],
        "adam_epsilon": ours["epsilon"],
        "max_grad_norm": ours["max_grad_norm"],
    }


def run(name: str, world: World, order: np.ndarray) -> Curve:
    """One run of a trainer on rows in this order: int[steps, rows]."""
    assert trl.__version__ == VERSION
    trainer_class, config_class, settings = KINDS[name]
    table, reward = rows_of(name, world), name == "reward"
    place, auto = (world.judge, CLASSIFIER) if reward else (world.policy, transformers.AutoModelForCausalLM)
    micro_batch = curves.BATCH if name in WHOLE_BATCH else curves.MICRO_BATCH
    with tempfile.TemporaryDirectory() as folder:
        common = arguments(folder, micro_batch) | {"train_sampling_strategy": "sequential"}
        trainer = trainer_class(
            model=auto.from_pretrained(place, dtype=torch.float32),
            args=config_class(**(common | settings)),
            train_dataset=datasets.Dataset.from_list([table[row] for row in order.reshape(-1)]),
            processing_class=transformers.AutoTokenizer.from_pretrained(place),
        )
        return trained(trainer, len(order))


def trained(trainer: Any, steps: int) -> Curve:
    """Return a trainer's log of each step, and its final weights."""
    trainer.remove_callback(transformers.PrinterCallback)
    torch.set_num_threads(1)  # threads would wait for each other more than they compute
    trainer.train()
    logs = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(logs) == steps
    loss, grad_norm = (np.array([row[key] for row in logs]) for key in ("loss", "grad_norm"))
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_model(folder)
        return Curve(loss, grad_norm, curves.weights_of(load_checkpoint(folder)))


def rows_of(name: str, world: World) -> list[dict[str, Any]]:
    """The rows as a trainer takes them."""
    table = experiments.rows(curves.data_of(name, world))
    if name.startswith("sft"):
        return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in table]
    return table
