"""Options of the preference losses: which are valid, that each changes the loss, and their effect on a step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.core.metrics import values
from rlhf_jax.methods import dpo
from rlhf_jax.methods.dpo import PairLogps, sum_tokens
from rlhf_jax.methods.offline import Updates
from rlhf_jax.methods.preference_table import LOSSES, PreferenceLossConfig
from rlhf_jax.models.head import TokenStats
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.stages.dpo import DPOConfig
from rlhf_jax.types import PreferenceBatch, RlhfError
from tests.support import tiny
from tests.support.programs import assert_close

CHANGES: dict[str, Any] = {
    "label_smoothing": 0.1,
    "divergence": "forward_kl",
    "discopop_tau": 0.5,
    "simpo_gamma": 1.5,
    "cpo_alpha": 0.3,
    "dpop_lambda": 3.0,
    "alpha_dpo_alpha": 2.0,
    "alphapo_alpha": -1.0,
    "ld_alpha": 0.3,
    "use_weighting": True,
}


def base(name: str) -> dict[str, Any]:
    """Return the options that a loss requires."""
    return {"losses": (name,), "label_smoothing": 0.2 if name == "exo_pair" else 0.0}


def logps(config: PreferenceLossConfig, batch: PreferenceBatch, seed: int) -> PairLogps:
    """Compute a config's loss on random tokens."""
    rng = np.random.default_rng(seed)
    chosen, rejected = (
        TokenStats(logprobs, logprobs, batch.chosen.response_mask, squares)
        for logprobs, squares in jnp.asarray(-rng.random((2, 2, *batch.chosen.response.shape)), jnp.float32)
    )
    return sum_tokens(config, chosen, rejected, batch.chosen.response_mask, batch.rejected.response_mask)


def preference_loss(config: PreferenceLossConfig, batch: PreferenceBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of random tokens, other ones under the reference."""
    policy, reference = (logps(config, batch, seed) for seed in (0, 1))
    tokens, mean = dpo.lengths_of(batch), dpo.tokens_per_pair(batch, ())
    reference = reference if config.needs_reference else None
    loss, metrics = dpo.preference_loss(config, policy, reference, tokens, beta=0.3, axes=(), tokens_per_pair=mean)
    return loss, values(metrics)


def test_every_option_matters_to_each_loss_that_reads_it_and_no_other_takes_it():
    batch = jax.tree.map(jnp.asarray, tiny.preferences(8))
    configs: dict[str, PreferenceLossConfig] = {name: PreferenceLossConfig(**base(name)) for name in LOSSES}
    for name in LOSSES:
        for option, value in CHANGES.items():
            if LOSSES[name].takes(option):
                configs[f"{name} {option}"] = PreferenceLossConfig(**(base(name) | {option: value}))
            else:
                with pytest.raises(ValueError, match=f"{option} = .* has no effect with {name}"):
                    PreferenceLossConfig(**(base(name) | {option: value}))
    alpha: dict[str, Any] = {"divergence": "alpha_divergence", "losses": ("sigmoid",)}
    configs["sigmoid alpha"] = PreferenceLossConfig(**alpha)
    configs["sigmoid alpha 0.2"] = PreferenceLossConfig(**alpha, divergence_alpha=0.2)

    @jax.jit
    def losses():
        found = {}
        for name, config in configs.items():
            found[name], _ = preference_loss(config, batch)
        return found

    found = jax.device_get(losses())
    for name, loss in found.items():
        if name != (alone := name.split()[0]) and name != "sft divergence":  # of which sft reads nothing
            assert abs(loss - found[alone]) > 1e-3, name
    assert abs(found["sigmoid alpha"] - found["sigmoid alpha 0.2"]) > 1e-4
    assert len({f"{found[name]:.5f}" for name in LOSSES} - {f"{found['sigmoid']:.5f}"}) >= len(LOSSES) - 4


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"losses": ()}, "losses is empty"),
        ({"losses": ("sigmoid", "sigmoid")}, "names a loss twice"),
        ({"losses": ("dpo",)}, "losses = .*should be a list of one of 'sigmoid'"),
        ({"loss_weights": (1.0, 2.0)}, "loss_weights = .* one weight for each"),
        ({"label_smoothing": 0.5, "losses": ("robust",)}, "label_smoothing = 0.5 .*below 0.5"),
        ({"losses": ("exo_pair",)}, "exo_pair divides by label_smoothing or takes its logarithm"),
        ({"divergence_alpha": 0.2}, "divergence_alpha = 0.2 has no effect with divergence = 'reverse_kl'"),
        ({"divergence": "alpha_divergence", "divergence_alpha": 1.0}, "divergence_alpha = 1.0 must be below 1"),
        (
            {"divergence": "forward_kl", "losses": ("sigmoid", "bco_pair")},
            "divergence = .* has no effect with bco_pair",
        ),
        ({"losses": ("discopop",), "discopop_tau": 0.0}, "discopop_tau = 0.0 must be above 0"),
        ({"ld_alpha": 1.0}, "ld_alpha = 1.0 must be below 1"),
        (
            {"ld_alpha": 0.5, "losses": ("sft", "simpo")},
            "has no effect with sft, simpo, because likelihoods",
        ),
        ({"use_weighting": True, "losses": ("aot",)}, "use_weighting = True has no effect with aot"),
        ({"smoothing": 0.1}, "smoothing is not a field"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_work_is_refused(section, message):
    with pytest.raises(RlhfError, match=f"^config.dpo.loss.*{message}"):
        configs.build(PreferenceLossConfig, section, "config.dpo.loss")


def test_length_desensitisation_cuts_the_sums_of_preferences_and_no_likelihood_nor_mean():
    batch = jax.tree.map(jnp.asarray, tiny.preferences(8))
    mixture = PreferenceLossConfig(losses=("sigmoid", "cpo", "simpo", "orpo", "sft"), ld_alpha=0.3)
    alone = [PreferenceLossConfig(losses=(name,)) for name in ("simpo", "orpo", "sft")]

    @jax.jit
    def losses():
        def loss(config):
            return preference_loss(config, batch)

        return loss(mixture)[1], [loss(config)[0] for config in alone]

    metrics, others = jax.device_get(losses())
    for config, loss in zip(alone, others, strict=True):
        np.testing.assert_allclose(metrics[f"loss/{config.losses[0]}"], loss, rtol=1e-6)
    masks = np.stack([batch.chosen.response_mask, batch.rejected.response_mask])
    shared = masks.sum(axis=2).min(axis=0)[:, None]
    counted = np.where(np.cumsum(masks, axis=2) <= shared, 1.0, 0.3) * masks
    own, theirs = (-np.random.default_rng(seed).random((2, 2, *masks.shape[1:]))[:, 0] for seed in (0, 1))
    (w, l), (ref_w, ref_l) = ((counted * model).sum(axis=2) for model in (own, theirs))  # noqa: E741
    likelihood = -(own[0] * masks[0]).sum() / masks[0].sum()
    np.testing.assert_allclose(
        metrics["loss/sigmoid"], np.mean(np.log1p(np.exp(0.3 * (l - ref_l - w + ref_w)))), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["loss/cpo"], np.mean(np.log1p(np.exp(-0.3 * (w - l)))) + likelihood, rtol=1e-5)
    assert abs(metrics["logps/chosen"] - np.mean(w)) < 1e-5


def test_an_option_of_one_loss_of_a_mixture_is_read():
    PreferenceLossConfig(losses=("simpo", "sft"), simpo_gamma=1.0)
    with pytest.raises(ValueError, match=r"simpo_gamma = 1.0 has no effect with sigmoid, sft: .* among .*simpo"):
        PreferenceLossConfig(losses=("sigmoid", "sft"), simpo_gamma=1.0)


DPO: dict[str, Any] = {
    "kind": "dpo",
    "policy": "sft",
    "preferences": None,
    "beta": 0.1,
    "optimizer": dataclasses.asdict(tiny.OPTIMIZER),
    "batch_size": 16,
    "epochs": 1.0,
    "sample_prompts": 1,
    "eval_every": 1,
    "loop": {"steps_per_call": 1, "checkpoint_every": 1},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta = 0.0 must be above 0"),
        (
            {"optimizer": DPO["optimizer"] | {"micro_batch": 4}, "loss": {"losses": ["sft", "aot"]}},
            "optimizer.micro_batch = 4 does not work with aot",
        ),
    ],
    ids=["beta", "micro_batch"],
)
def test_a_stage_refuses_what_cannot_work(changes, message):
    with pytest.raises(RlhfError, match=message):
        configs.build(DPOConfig, DPO | changes, "config.dpo")


def test_a_stage_takes_its_loss_from_its_config():
    config = configs.build(DPOConfig, DPO | {"loss": {"losses": ["ipo", "sft"], "loss_weights": [1, 0.5]}}, "dpo")
    assert config.loss == PreferenceLossConfig(losses=("ipo", "sft"), loss_weights=(1.0, 0.5))
    assert configs.build(DPOConfig, DPO, "dpo").loss == PreferenceLossConfig()


def step(loss: PreferenceLossConfig, optimizer: OptimizerConfig, frozen: dict[str, Any]):
    """One step of the stage: parameters and metrics after it."""
    placement = make_placement(tiny.ONE_DEVICE, seeds=1)
    params = {"policy": tiny.policy_params()}
    state = placement.put_state(TrainState(jnp.int32(0), params, make_optimizer(optimizer, 3).init(params)))
    program = placement.compile(dpo.make_step(Updates(tiny.POLICY, optimizer, 3, ()), loss), state)
    state, metrics, _ = program(state, frozen, tiny.several([tiny.preferences(16)]), jax.random.key(0))
    return jax.device_get((state.params, metrics))


def test_likelihoods_accumulate_to_a_mean_over_tokens_and_need_no_reference():
    """A mean over the tokens of each micro-batch would be another loss: their responses differ in length."""
    loss, frozen = PreferenceLossConfig(losses=("orpo", "simpo"), loss_weights=(1.0, 0.5)), {"beta": jnp.float32(0.3)}
    assert not loss.needs_reference
    whole = step(loss, tiny.OPTIMIZER, frozen)
    assert_close(step(loss, dataclasses.replace(tiny.OPTIMIZER, micro_batch=4), frozen), whole)


OWN = """
import jax

def mine(chosen_logratios, rejected_logratios, *, beta, scale=1.0):
    return -jax.nn.log_sigmoid(scale * beta * (chosen_logratios - rejected_logratios))

def smoothed(chosen_logratios, *, beta, label_smoothing):
    return (1 - label_smoothing) * jax.nn.sigmoid(-beta * chosen_logratios)

def of_the_batch(chosen_logps, *, axes):
    return chosen_logps

def misspelt(chosen_logratio, *, beta):
    return chosen_logratio
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def of_section(losses: list[str], **options: Any) -> PreferenceLossConfig:
    return configs.build(PreferenceLossConfig, {"losses": losses, **options}, "config.dpo.loss")


def test_a_loss_of_ones_own_is_mixed_with_weights_and_reads_options(own):
    config = of_section([f"{own}:mine", f"{own}:smoothed", "sft"], loss_weights=[2.0, 1.0, 0.5], label_smoothing=0.2)
    batch = jax.tree.map(jnp.asarray, tiny.preferences(8))
    loss, metrics = preference_loss(config, batch)
    policy, reference = (logps(config, batch, seed) for seed in (0, 1))
    logratios = np.asarray(policy.chosen - reference.chosen), np.asarray(policy.rejected - reference.rejected)
    mine = np.mean(np.log1p(np.exp(-0.3 * (logratios[0] - logratios[1]))))
    smoothed = np.mean(0.8 / (1 + np.exp(0.3 * logratios[0])))
    np.testing.assert_allclose(metrics[f"loss/{own}:mine"], mine, rtol=1e-5)
    np.testing.assert_allclose(metrics[f"loss/{own}:smoothed"], smoothed, rtol=1e-5)
    np.testing.assert_allclose(loss, 2 * mine + smoothed + 0.5 * metrics["loss/sft"], rtol=1e-5)


def test_a_changed_file_is_another_step(own):
    config = of_section([f"{own}:mine"])
    before = dpo.make_step(Updates(tiny.POLICY, tiny.OPTIMIZER, 3, ()), config)
    assert dpo.make_step(Updates(tiny.POLICY, tiny.OPTIMIZER, 3, ()), config) is before
    own.write_text(OWN.replace("scale=1.0", "scale=2.0"))
    assert dpo.make_step(Updates(tiny.POLICY, tiny.OPTIMIZER, 3, ()), config) is not before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "misspelt",
            {},
            r"misspelt has the signature \(chosen_logratio, \*, beta\): write `def misspelt\(\*, \.\.\.\)`",
        ),
        ("missing", {}, "has no function 'missing'"),
        ("mine", {"simpo_gamma": 1.0}, "simpo_gamma = 1.0 has no effect with"),
        ("mine", {"divergence": "forward_kl"}, "divergence = 'forward_kl' has no effect with"),
        ("of_the_batch", {"use_weighting": True}, "use_weighting = True has no effect with"),
    ],
)
def test_what_a_loss_of_ones_own_cannot_be_is_one_message(own, name, options, message):
    with pytest.raises(RlhfError, match=message):
        of_section([f"{own}:{name}"], **options)


def test_a_loss_of_ones_own_with_statistics_of_the_batch_is_not_accumulated(own):
    section = DPO | {"loss": {"losses": [f"{own}:of_the_batch"]}, "optimizer": DPO["optimizer"] | {"micro_batch": 4}}
    with pytest.raises(RlhfError, match="of_the_batch, which uses statistics of the whole batch"):
        configs.build(DPOConfig, section, "config.dpo")
