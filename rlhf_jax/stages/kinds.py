"""Table of the kinds of stages: one row per kind, read by experiments, the command line and reports.

A new kind is one file in this directory and one row of `KINDS`. A user's own kind is a `Kind` in a Python file, and
`kind = "path/file.py:NAME"` in a config; `examples/stage.py` shows one.
"""

import dataclasses
import string
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from rlhf_jax import user_code
from rlhf_jax.config import Section
from rlhf_jax.loading.context import Context
from rlhf_jax.methods import preference_table, reward_table
from rlhf_jax.methods.per_run import OPTIMIZER
from rlhf_jax.stages import (
    best_of_n,
    dpo,
    evaluate,
    frontier,
    gold,
    group_rl,
    kto,
    noisy_labels,
    online_dpo,
    pool,
    ppo,
    preferences,
    rejection_sampling,
    reward_model,
    sft,
)
from rlhf_jax.types import RlhfError, Row

Colour = Literal["grey", "amber", "pink", "green", "blue", "orange", "sky", "violet", "brown"]


@runtime_checkable
class StageConfig(Section, Protocol):
    """The config of a stage."""

    @property
    def kind(self) -> str:
        """Name of its kind."""


class Series(NamedTuple):
    """A column of metrics.jsonl and its name in a figure; `eval/` columns have a value only at evaluations."""

    column: str
    name: str
    kind: str | None = None  # kind whose colour is used; None: the stage's own


class Panel(NamedTuple):
    """One panel of a figure of learning curves."""

    title: str
    unit: str
    series: tuple[Series, ...]
    # A level to compare with, drawn dashed; a function computes it from the stage's section of the config.
    chance: float | Callable[[Row], float | None] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of stage: its config, the function that runs it, and how reports show it.

    `config` is a frozen dataclass whose field `kind: str` names the kind. `run(config, context)` reads the outputs of
    earlier stages through the `Context`, writes into `context.directory`, and returns the contents of summary.json.
    Raises ValueError if the fields of a row are inconsistent.
    """

    config: type
    run: Callable[[Any, Context], dict[str, Any]]
    summary: str  # one line: what the stage does
    title: str = ""  # heading of its learning curves
    # Name of its policy in figures: formatted with the config's fields, or a function of the stage's section of the
    # config; None: the stage's name.
    label: str | Callable[[Row], str] | None = None
    seeded: bool = False  # trains `seeds` runs at once; other kinds train one, with `seed`
    # Numbers of the config, by dotted path, that may differ between runs that train at once.
    numbers: tuple[str, ...] = ()
    unit: str | None = None  # plural name of a batch's rows, for kinds that train with `batch_size` and `optimizer`
    curves: tuple[Panel, ...] = ()  # learning curves: lines for training batches, dots for held-out data
    caption: str = ""  # below the learning curves
    step: str = "step"  # what a row of metrics.jsonl counts
    colour: Colour = "grey"

    def __post_init__(self) -> None:
        if not (dataclasses.is_dataclass(self.config) and isinstance(self.config, type) and callable(self.run)):
            raise ValueError("config must be a dataclass, and run a function (config, context) -> dict")
        fields = {field.name for field in dataclasses.fields(self.config)}
        needed = {"kind", *(("batch_size", "optimizer") if self.unit else ())}
        if isinstance(self.label, str):
            needed |= {name for _, name, _, _ in string.Formatter().parse(self.label) if name}
        if missing := needed - fields:
            raise ValueError(f"{self.config.__name__} has no field {', '.join(sorted(missing))}")
        if self.colour not in typing.get_args(Colour):
            raise ValueError(f"colour = {self.colour!r} should be one of {', '.join(typing.get_args(Colour))}")


SAMPLING = (
    Panel("Score", "reward", (Series("objective/scores", ""),)),
    Panel("KL from the start", "nats per response", (Series("objective/kl", ""),), chance=0.0),
    Panel("Length", "tokens per response", (Series("completions/mean_length", ""),)),
)
"""Learning curves of kinds that sample from the policy during training."""


def _pair_loss(*series: Series) -> Panel:
    return Panel(
        "Loss", "nats per pair", series, chance=lambda section: preference_table.level_at_reference(section["loss"])
    )


def _loss_and_beta(section: Row) -> str:
    losses = " + ".join(map(preference_table.label_of, section["loss"]["losses"]))
    return f"{losses} β = {section['beta']:g}"


MARGIN = Panel(
    "Reward margin", "β × nats", (Series("rewards/margins", ""), Series("eval/rewards/margins", "")), chance=0.0
)

KINDS = {
    "gold": Kind(
        config=gold.GoldConfig,
        run=gold.run,
        summary="Fit a judge to human ratings or labels",
        colour="amber",
    ),
    "sft": Kind(
        config=sft.SFTConfig,
        run=sft.run,
        summary="Train a tokenizer and a policy on demonstrations, by maximum likelihood",
        title="Supervised fine-tuning",
        label="SFT",
        unit="demonstrations",
        curves=(
            Panel("Cross-entropy", "nats per token", (Series("loss", "train"), Series("eval/loss", "held out"))),
            Panel(
                "Next token predicted",
                "share of tokens",
                (Series("mean_token_accuracy", "train"), Series("eval/mean_token_accuracy", "held out")),
            ),
        ),
    ),
    "preferences": Kind(
        config=preferences.PreferencesConfig,
        run=preferences.run,
        summary="Sample pairs of responses from a policy, and label them by a judge",
    ),
    "noisy_labels": Kind(
        config=noisy_labels.NoisyLabelsConfig,
        run=noisy_labels.run,
        summary="Keep some pairs of an earlier stage, and flip a share of their labels",
    ),
    "reward_model": Kind(
        config=reward_model.RewardModelConfig,
        run=reward_model.run,
        summary="Train a reward model on preferences",
        title="Reward model",
        label=lambda section: reward_table.label_of(section["loss"]["name"]),
        unit="comparisons",
        curves=(
            Panel(
                "Loss",
                "mean over the batch",
                (Series("loss", ""),),
                chance=lambda section: reward_table.level_at_equal_scores(section["loss"]),
            ),
            Panel(
                "Pairs ranked correctly",
                "share of pairs",
                (
                    Series("accuracy", "train"),
                    Series("eval/accuracy", "held out"),
                    Series("eval/judge_agreement", "judge agrees", "gold"),
                ),
                chance=0.5,
            ),
        ),
        caption="Dashed: where all scores are equal.",
        colour="pink",
    ),
    "best_of_n": Kind(
        config=best_of_n.BestOfNConfig,
        run=best_of_n.run,
        summary="Sample N responses to a prompt, and select by a reward model, for every N",
        colour="green",
    ),
    "pool": Kind(
        config=pool.PoolConfig,
        run=pool.run,
        summary="Sample many responses per prompt, and score them with several reward models",
        colour="green",
    ),
    "rejection_sampling": Kind(
        config=rejection_sampling.RejectionSamplingConfig,
        run=rejection_sampling.run,
        summary="Keep a policy's best responses as demonstrations for SFT",
    ),
    "dpo": Kind(
        config=dpo.DPOConfig,
        run=dpo.run,
        summary="Train a policy on preference pairs, with DPO or a related loss",
        title="DPO",
        label=_loss_and_beta,
        seeded=True,
        numbers=("beta", *OPTIMIZER),
        unit="pairs",
        curves=(
            _pair_loss(Series("loss", ""), Series("eval/loss", "")),
            Panel(
                "Pairs ranked correctly",
                "share of pairs",
                (Series("rewards/accuracies", ""), Series("eval/rewards/accuracies", "")),
                chance=0.5,
            ),
            MARGIN,
        ),
        caption="Dashed: where the policy equals the reference.",
        colour="blue",
    ),
    "kto": Kind(
        config=kto.KTOConfig,
        run=kto.run,
        summary="Train a policy on single responses, each labelled good or bad",
        title="KTO",
        seeded=True,
        numbers=("beta", *OPTIMIZER),
        unit="responses",
        curves=(
            Panel("Loss", "per response", (Series("loss", ""), Series("eval/loss", ""))),
            Panel(
                "Implicit reward",
                "β × nats",
                (Series("rewards/chosen", "good"), Series("rewards/rejected", "bad")),
                chance=0.0,
            ),
            MARGIN,
        ),
        caption="Dashed: where every policy starts.",
        colour="sky",
    ),
    "online_dpo": Kind(
        config=online_dpo.OnlineDPOConfig,
        run=online_dpo.run,
        summary="Train a policy on pairs of its own samples, labelled during training",
        title="Online DPO",
        label=lambda section: f"online {_loss_and_beta(section)}",
        seeded=True,
        numbers=("beta", *OPTIMIZER),
        unit="pairs",
        curves=(*SAMPLING, _pair_loss(Series("loss", ""))),
        caption="Dashed: where the policy equals the reference.",
        step="iteration",
        colour="violet",
    ),
    "ppo": Kind(
        config=ppo.PPOConfig,
        run=ppo.run,
        summary="Train a policy with PPO, against a reward model",
        title="PPO",
        label="PPO",
        seeded=True,
        numbers=("kl_coef", *OPTIMIZER),
        unit="responses",
        curves=SAMPLING,
        step="iteration",
        colour="orange",
    ),
    "group_rl": Kind(
        config=group_rl.GroupRLConfig,
        run=group_rl.run,
        summary="Train a policy with GRPO, RLOO, REINFORCE++ or another method without a critic",
        title="Policy gradients without a value function",
        seeded=True,
        numbers=("kl_coef", *OPTIMIZER),
        unit="responses",
        curves=SAMPLING,
        step="iteration",
        colour="brown",
    ),
    "evaluate": Kind(
        config=evaluate.EvaluateConfig,
        run=evaluate.run,
        summary="Compare policies on the same test prompts",
    ),
    "frontier": Kind(
        config=frontier.FrontierConfig,
        run=frontier.run,
        summary="Score checkpoints along runs, and compare methods at equal KL",
    ),
}
"""Kinds by their names in configs, in the order of the figures."""


def find_kind(name: str, path: str) -> Kind:
    """Return the kind that a config names, from the table or from a user's file.

    Args: path names the config's field in messages, such as `config.ppo.kind`.
    Raises RlhfError for an unknown name, and for an object that is not a `Kind`.
    """
    if ":" not in name:
        if name not in KINDS:
            raise RlhfError(
                f"{path} = {name!r} should be one of {', '.join(KINDS)}, or a kind of your own, path/file.py:NAME"
            )
        return KINDS[name]
    found = user_code.load_object(name, "stage kind")
    if not isinstance(found, Kind):
        raise RlhfError(
            f"{path} = {name!r} is a {type(found).__name__}: make it a rlhf_jax.stages.kinds.Kind(config=..., run=..., "
            "summary=...)"
        )
    return found


def shown_kind(name: str) -> Kind | None:
    """Return a stage's kind for reports; None for a method without a stage, or if the user's file no longer exists."""
    if ":" not in name:
        return KINDS.get(name)
    return find_kind(name, "kind") if user_code.source_file(name, "stage kind") else None
