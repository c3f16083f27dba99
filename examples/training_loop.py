"""Your own training loop: DPO in thirty lines, from a stage's policy to an export.

    python examples/training_loop.py runs/smoke runs/mine

reads the SFT policy and the preferences of a run (for example, of `rlhf-jax --config=quickstart:smoke
--workdir=runs/smoke`), trains, compares the result with the initial policy by the run's reward model, and writes it to
runs/mine. transformers can load it, and a config can name it: `--config.evaluate.policies=ppo,runs/mine`.
"""

import sys

import jax
import optax
import pandas as pd

import rlhf_jax
from rlhf_jax import Policy, preference_losses, sequence_logprobs


def train_dpo(
    start: Policy, pairs: pd.DataFrame, *, beta: float, learning_rate: float, batch_size: int, epochs: int
) -> Policy:
    """Train a policy on pairs with DPO (Rafailov et al. 2023); the initial policy is the reference."""
    arrays = rlhf_jax.encode_preferences(pairs, start.tokenizer, max_prompt_tokens=16, max_response_tokens=32)
    optimizer = optax.adam(learning_rate)

    def logprobs(params, batch):
        chosen, rejected = start.network.pair_stats(params, batch)
        return (
            sequence_logprobs(chosen.logprobs, batch.chosen.response_mask),
            sequence_logprobs(rejected.logprobs, batch.rejected.response_mask),
        )

    def loss(params, batch):
        (chosen, rejected), (ref_chosen, ref_rejected) = logprobs(params, batch), logprobs(start.params, batch)
        return preference_losses.sigmoid_loss(chosen - ref_chosen, rejected - ref_rejected, beta=beta).mean()

    @jax.jit
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    params, state = start.params, optimizer.init(start.params)
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.key(epoch), len(pairs))
        for first in range(0, len(pairs) - batch_size + 1, batch_size):
            batch = jax.tree.map(lambda leaf, which=order[first : first + batch_size]: leaf[which], arrays)
            params, state, value = step(params, state, batch)
            print(f"epoch {epoch + 1}, pairs {first + batch_size}: loss {value:.4f}")
    return start._replace(params=params)


def main(workdir: str, out: str) -> pd.DataFrame:
    """Train, export, and compare with the initial policy; return the comparison."""
    run = rlhf_jax.Run(workdir)
    start, reward_model = run.load_policy("sft"), run.load_reward_model("reward_model")
    pairs = run.pairs("preferences")
    policy = train_dpo(start, pairs, beta=0.1, learning_rate=1e-3, batch_size=32, epochs=2)
    rlhf_jax.export(policy, out)
    prompts = pairs["prompt"].unique().tolist()
    return rlhf_jax.evaluate({"sft": start, "mine": rlhf_jax.load_policy(out)}, prompts, reward_model)


if __name__ == "__main__":
    print(main(*sys.argv[1:]).T)
