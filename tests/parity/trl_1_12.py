# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Runs PPO as TRL 1.12 wrote it, and records what its `train()` computes on the way.

TRL 1.12 was the last with a PPOTrainer. Its step is one function with everything inline, so that the numbers are read
where they are made: from the local variables of `train()` at each call of `backward`. An environment holds one version
of TRL; so this file is also a script, run in the one that has 1.12.
"""

import functools
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "1.12.0"
ROOT = str(Path(__file__).parents[2])
PAD, EOS = 0, 1
SETTINGS = {"kl_coef": 0.3, "gamma": 0.95, "gae_lambda": 0.9, "clip_ratio": 0.2, "clip_range": 0.3, "value_coef": 0.7}


@functools.cache
def record(seed: int) -> dict[str, np.ndarray]:
    """Inputs and results of the last of eight gradient steps of one PPO iteration, and random numbers whitened."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "record.npz")
        environment = {**os.environ, "PYTHONPATH": ROOT, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        command = [str(python()), str(Path(__file__).resolve()), str(seed), str(out)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with np.load(out) as arrays:
            return dict(arrays)


def python() -> Path:
    """The interpreter of an environment whose TRL is 1.12; torch and all else it finds in the one it was made by."""
    place = Path(sys.prefix, f"venv-trl-{VERSION}")
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=sys.prefix) as temporary:
            made = Path(temporary, place.name)
            venv.create(made, symlinks=True)
            python = made / "bin" / "python"
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, f"trl=={VERSION}"], check=True)
            [packages] = made.glob("lib/python*/site-packages")
            everything_else = Path(sysconfig.get_path("purelib")).resolve()  # the environment may be a link
            (packages / "everything_else.pth").write_text(f"{everything_else}\n")  # after its own
            try:
                os.rename(made, place)  # whole or not at all
            except OSError:
                assert place.exists()  # another worker was first
    return place / "bin" / "python"


def _train(seed: int) -> dict[str, Any]:
    import datasets
    import torch
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from tests.parity import tiny

    assert trl.__version__ == VERSION
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, tiny.VOCABULARY, size=rng.integers(2, 6)).tolist() for _ in range(16)]
    policy, reference = tiny.language_model(), tiny.language_model()
    for model in (policy, reference):  # padding is never sampled
        model.lm_head.register_forward_hook(
            lambda module, inputs, logits: logits.masked_fill(torch.arange(tiny.VOCABULARY) == PAD, -1e4)
        )
    config = PPOConfig(
        output_dir="out",
        seed=seed,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=100,
        save_strategy="no",
        total_episodes=16,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        num_mini_batches=2,
        num_ppo_epochs=4,
        response_length=8,
        stop_token="eos",
        temperature=1.0,
        missing_eos_penalty=None,
        num_sample_generations=0,
        optim="sgd",  # Adam would blow rounding errors up, and goldens would not travel between machines
        learning_rate=0.3,
        kl_coef=SETTINGS["kl_coef"],
        gamma=SETTINGS["gamma"],
        lam=SETTINGS["gae_lambda"],
        cliprange=SETTINGS["clip_ratio"],
        cliprange_value=SETTINGS["clip_range"],
        vf_coef=SETTINGS["value_coef"],
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tiny.tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=tiny.score_model(),
        value_model=tiny.score_model(),
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
    )

    found: dict[str, Any] = {}
    backward, whiten, mean = trainer.accelerator.backward, ppo_trainer.masked_whiten, ppo_trainer.masked_mean

    def recording_whiten(values, mask, shift_mean=True):
        found["unwhitened"] = values
        return whiten(values, mask, shift_mean)

    means = []

    def recording_mean(values, mask, axis=None):
        result = mean(values, mask, axis)
        if sys._getframe(1).f_code.co_name == "train":
            means.append(result.detach())
        return result

    def recording_backward(loss):
        seen = sys._getframe(1).f_locals
        for name in ("new_logprobs", "vpred"):
            seen[name].retain_grad()
        backward(loss)
        rows = torch.as_tensor(seen["micro_batch_inds"])
        found.update(
            {name: seen[name] for name in ("scores", "logprobs", "ref_logprobs", "kl", "rewards", "values", "returns")}
        )
        found["advantages"] = seen["advantages"]
        found["response_mask"], found["value_mask"] = ~seen["padding_mask"], ~seen["padding_mask_p1"]
        found["step_response_mask"] = found["response_mask"][rows]
        found["step_value_mask"] = found["value_mask"][rows]
        names = ("mb_logprobs", "mb_advantage", "mb_values", "mb_return", "new_logprobs", "vpred", "pg_loss", "vf_loss")
        found.update({f"step_{name.removeprefix('mb_')}": seen[name] for name in names})
        found["step_new_logprobs_grad"] = seen["new_logprobs"].grad
        found["step_vpred_grad"] = seen["vpred"].grad

    np.random.seed(seed)  # train() draws its minibatches from the global generator
    trainer.accelerator.backward = recording_backward
    ppo_trainer.masked_whiten, ppo_trainer.masked_mean = recording_whiten, recording_mean
    trainer.train()
    # Each step takes four means: value loss, its clipped share, policy loss, its clipped share.
    assert len(means) == 4 * 8
    found["step_vf_clipfrac"], found["step_pg_clipfrac"] = means[-3], means[-1]

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    mask = torch.arange(5)[None, :] < torch.tensor([5, 3, 0, 1, 4, 2])[:, None]
    weights = torch.linspace(-1, 1, 30).reshape(6, 5)
    white = whiten(x, mask)
    (weights * white * mask).sum().backward()
    found.update(random=x, random_mask=mask, random_weights=weights, random_white=white, random_grad=x.grad)
    found["random_variance"] = ppo_trainer.masked_var(x, mask)
    found["random_population_variance"] = ppo_trainer.masked_var(x, mask, unbiased=False)
    return {name: value.detach().numpy() for name, value in found.items()}


if __name__ == "__main__":
    np.savez(sys.argv[2], **_train(int(sys.argv[1])))
