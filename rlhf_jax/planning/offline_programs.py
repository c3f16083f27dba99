"""Programs of the stages that train on a table: the update of sft, reward_model, dpo and kto.

States, frozen networks and batches are those that the stages' `run` functions make, with rows of the maximum lengths.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax.config import StageName
from rlhf_jax.loading.models import Pretrained
from rlhf_jax.loading.trainable import N, stack, trainable
from rlhf_jax.methods import dpo as dpo_method
from rlhf_jax.methods.dpo import ReferencedBatch, pair_logps
from rlhf_jax.methods.offline import OfflineConfig, Updates
from rlhf_jax.planning import shapes
from rlhf_jax.planning.stage_outlines import (
    ProgramOutline,
    RunOutline,
    StageOutline,
    jitted,
    keys_of,
    of_seeds,
    placed_frozen,
    placed_state,
    trained_params,
)
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.programs import Step
from rlhf_jax.stages import kto, reward_model, sft
from rlhf_jax.stages.dpo import DPOConfig
from rlhf_jax.stages.preferences import PreferencesConfig
from rlhf_jax.types import RlhfError, UnpairedBatch


def sft_outline(run: RunOutline, name: str, config: sft.SFTConfig) -> StageOutline:
    """Outline of sft: the update on sequences."""
    start, run = run.outlines.start_policy(name, config), of_seeds(run, 1)
    tuning = config.model if isinstance(config.model, Pretrained) else None
    network = trainable(start.network, tuning)
    updates = _updates(run, config, network)
    state = jax.eval_shape(lambda params: updates.init({"policy": trained_params(network, params)}), start.params)
    frozen = {"base": start.params if network.lora else None}
    batch = shapes.tokens(run.data, config.batch_size)
    return _offline(
        run, config, updates, sft.make_step(updates), state, frozen, batch, f"sequence of {run.width} tokens"
    )


def reward_model_outline(run: RunOutline, name: str, config: reward_model.RewardModelConfig) -> StageOutline:
    """Outline of reward_model: the update on pairs or rankings, of all members of an ensemble."""
    del name
    run = of_seeds(run, 1 if config.ensemble is None else config.ensemble.members)
    start = run.outlines.start_reward_model(config)
    network = trainable(start.network, config.model if isinstance(config.model, Pretrained) else None)
    updates = _updates(run, config, network)

    def init(params: PyTree) -> TrainState:
        return stack([updates.init({"reward": trained_params(network, params)}) for _ in range(run.seeds)])

    frozen = {"base": start.params if network.lora else None}
    batch, row = shapes.pairs(run.data, config.batch_size), f"pair of 2 x {run.width} tokens"
    if config.loss.spec.column is not None:
        batch = shapes.labelled_pairs(run.data, config.batch_size)
    if not config.loss.spec.pairwise:
        most = responses_per_prompt(run, config.preferences)
        batch = shapes.comparisons(run.data, config.batch_size, most)
        row = f"prompt with {most} responses, {run.width} tokens each"
    step = reward_model.make_step(updates, config.loss)
    return _offline(run, config, updates, step, jax.eval_shape(init, start.params), frozen, batch, row)


def dpo_outline(run: RunOutline, name: str, config: DPOConfig) -> StageOutline:
    """Outline of dpo: the update on pairs."""
    del name
    reference = run.outlines.initial(config.policy, config.tuning)
    network, updates = reference.network, _updates(run, config, reference.network)

    def init(params: PyTree) -> TrainState:
        trained = trained_params(network, params)
        follower = {"reference": jax.tree.map(jnp.copy, trained)} if config.reference_update else {}
        return stack([updates.init({"policy": trained}, **follower) for _ in range(run.seeds)])

    batch: Any = shapes.pairs(run.data, config.batch_size)
    if config.cached_reference:
        logps = functools.partial(pair_logps, config.loss, network)
        batch = ReferencedBatch(batch, jax.eval_shape(logps, reference.params, batch))
    frozen: dict[str, Any] = {"beta": shapes.array(jnp.float32)}
    live = config.loss.needs_reference and not (config.cached_reference or config.reference_update)
    if live or network.lora:
        frozen["reference"] = reference.params
    step = dpo_method.make_step(updates, config.loss, config.reference_update)
    state = jax.eval_shape(init, reference.params)
    return _offline(run, config, updates, step, state, frozen, batch, f"pair of 2 x {run.width} tokens")


def kto_outline(run: RunOutline, name: str, config: kto.KTOConfig) -> StageOutline:
    """Outline of kto: the update on labelled responses."""
    del name
    reference = run.outlines.initial(config.policy, config.tuning)
    network, updates = reference.network, _updates(run, config, reference.network)

    def init(params: PyTree) -> TrainState:
        return stack([updates.init({"policy": trained_params(network, params)}) for _ in range(run.seeds)])

    own = shapes.sequences(run.data, config.batch_size)
    batch = UnpairedBatch(own, own if config.loss.estimates_kl else None, shapes.array(jnp.bool_, config.batch_size))
    frozen = {"reference": reference.params, "beta": shapes.array(jnp.float32)}
    state, step = jax.eval_shape(init, reference.params), kto.make_step(updates, config.loss)
    return _offline(run, config, updates, step, state, frozen, batch, f"response of {run.width} tokens")


def _updates(run: RunOutline, config: OfflineConfig, network: N) -> Updates[N]:
    return Updates(network, config.optimizer, 1, run.placement.axes)


def _offline(
    run: RunOutline,
    config: OfflineConfig,
    updates: Updates,
    step: Step,
    state: PyTree,
    frozen: PyTree,
    batch: PyTree,
    row: str,
) -> StageOutline:
    state, frozen, key = placed_state(run, state), placed_frozen(run, frozen), keys_of(run)
    program = ProgramOutline(
        "update", jitted(run.placement.compile(step, state)), (state, frozen, shapes.one_step(batch, run.seeds), key), 0
    )
    return StageOutline((program,), state, frozen, updates.network.config.compute_dtype, config.batch_size, row)


def responses_per_prompt(run: RunOutline, stage: StageName | None) -> int:
    """Return the number of responses to a prompt in a stage's preferences. Raises RlhfError if it is not known."""
    config = None if stage is None else run.stages[stage]
    if not isinstance(config, PreferencesConfig):
        raise RlhfError("the number of responses to a prompt is known only for rankings of a stage of kind preferences")
    return config.samples_per_prompt
