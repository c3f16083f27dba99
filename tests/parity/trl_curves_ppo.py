# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Whole runs of the PPOTrainer of TRL 1.12 on given rollouts, by its own `train()`: a script, like `trl_1_12.py`."""

import functools
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity import trl_1_12
from tests.support import curves
from tests.support import curves_online as online
from tests.support.curves import BATCH, Curve, World


def run(world: World, orders: list[np.ndarray]) -> list[Curve]:
    """Runs of the trainer, with the rows of each iteration in these orders: int[ITERATIONS, BATCH] each."""
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder, "asked.pickle"), Path(folder, "found.pickle")
        asked.write_bytes(pickle.dumps((world, orders)))
        own = {"PYTHONPATH": trl_1_12.ROOT, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        command = [str(trl_1_12.python()), str(Path(__file__).resolve()), str(asked), str(found)]
        done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return pickle.loads(found.read_bytes())


def _run(world: World, order: np.ndarray) -> Curve:
    import datasets
    import torch
    import transformers
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from rlhf_jax.loading.pretrained import load_checkpoint

    assert trl.__version__ == trl_1_12.VERSION
    given = online.rollouts("ppo")
    ours: dict[str, Any] = online.OPTIMIZER
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(world.policy, padding_side="left")
    prompts = [[rows[i] for i in places] for rows, places in zip(given.prompts, order, strict=True)]
    responses = [[rows[i] for i in places] for rows, places in zip(given.responses, order, strict=True)]

    def policy() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(world.policy, dtype=torch.float32)

    def judge() -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(world.judge, dtype=torch.float32)

    config = PPOConfig(
        output_dir="out",
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        num_sample_generations=0,
        gradient_checkpointing=False,
        total_episodes=online.ITERATIONS * BATCH,
        per_device_train_batch_size=BATCH,
        num_mini_batches=1,
        num_ppo_epochs=online.EPOCHS,
        response_length=curves.MOST_RESPONSE,
        stop_token="eos",
        temperature=1 - 1e-7,  # to which it adds 1e-7
        missing_eos_penalty=online.MISSING_EOS_PENALTY,
        learning_rate=ours["learning_rate"],
        weight_decay=ours["weight_decay"],
        adam_beta1=ours["b1"],
        adam_beta2=ours["b2"],
        adam_epsilon=ours["epsilon"],
        kl_coef=online.KL_COEF,
        gamma=online.PPO["gamma"],
        lam=online.PPO["gae_lambda"],
        cliprange=online.PPO["clip_ratio"],
        cliprange_value=online.PPO["value_clip"],
        vf_coef=online.PPO["vf_coef"],
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy(),
        ref_model=policy(),
        reward_model=judge(),
        value_model=judge(),
        train_dataset=datasets.Dataset.from_dict({"input_ids": [row for rows in given.prompts for row in rows]}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.dataloader = [tokenizer.pad({"input_ids": rows}, return_tensors="pt") for rows in prompts]
    left = iter(responses)

    def batch_generation(model: Any, queries: Any, batch_size: int, pad: int, generation_config: Any) -> Any:
        sequences = torch.cat([queries, torch.tensor(next(left))], dim=1)
        logits = ppo_trainer.forward(model, sequences, pad).logits[:, queries.shape[1] - 1 : -1]
        return sequences, logits

    ppo_trainer.batch_generation = batch_generation

    # TRL counts iterations in its schedule and ours updates: its own step does nothing, and each update makes one.
    updates = (ours["warmup_steps"], online.UPDATES)
    schedule: Any = transformers.get_scheduler(ours["schedule"], trainer.optimizer.optimizer, *updates)
    trainer.lr_scheduler = types.SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0])
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: schedule.step())

    losses, norms, backward = [], [], trainer.accelerator.backward

    def recording_backward(loss: Any) -> None:
        backward(loss)
        gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    trainer.accelerator.backward = recording_backward
    # TRL divides a variance by the count less one, and ours by the count: advantages of 64 tokens are 0.8 % smaller.
    ppo_trainer.masked_var = functools.partial(ppo_trainer.masked_var, unbiased=False)
    torch.set_num_threads(1)
    gc.freeze()  # train() collects garbage twice an iteration, which takes most of the time with so much imported
    trainer.train()
    weights = {}
    for name, model in (("policy", trainer.model.policy), ("value", trainer.model.value_model)):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        weights |= {f"{name}/{path}": leaf for path, leaf in curves.weights_of(load_checkpoint(name)).items()}
    assert len(losses) == online.UPDATES
    return online.over_iterations(Curve(np.array(losses), np.array(norms), weights))


if __name__ == "__main__":
    given_world, given_orders = pickle.loads(Path(sys.argv[1]).read_bytes())
    curves_found = [_run(given_world, order) for order in given_orders]
    Path(sys.argv[2]).write_bytes(pickle.dumps(curves_found))
