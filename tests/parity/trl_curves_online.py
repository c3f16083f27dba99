# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Whole runs of TRL 1.16's GRPOTrainer and RLOOTrainer on given rollouts, by their own `train()`."""

import itertools
import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl

from tests.parity import trl_curves
from tests.support import curves
from tests.support import curves_online as online
from tests.support.curves import Curve, World

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "grpo": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        # The paper's loss and penalty (eq. 3 and 4 of arXiv:2402.03300), which are not TRL's defaults.
        {"loss_type": "grpo", "use_bias_correction_kl": False},
    ),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {}),
}


def run(name: str, world: World, seed: int) -> Curve:
    """One run of a trainer; the seed is that of the order in which it takes the rows of a batch."""
    assert trl.__version__ == trl_curves.VERSION
    trainer_class, config_class, settings = KINDS[name]
    given = online.rollouts(name)
    prompts = [" ".join(f"w{token}" for token in row) for rows in given.prompts for row in rows[:: online.GROUP]]
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            **trl_curves.arguments(folder, curves.MICRO_BATCH, online.OPTIMIZER),
            **settings,
            seed=seed,
            shuffle_dataset=False,
            num_generations=online.GROUP,
            num_iterations=online.EPOCHS,
            max_completion_length=curves.MOST_RESPONSE,
            beta=online.KL_COEF,
            epsilon=online.CLIP,
            epsilon_high=online.CLIP,
        )
        trainer = trainer_class(
            model=transformers.AutoModelForCausalLM.from_pretrained(world.policy, dtype=torch.float32),
            reward_funcs=online.score,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=transformers.AutoTokenizer.from_pretrained(world.policy),
        )
        iterations = itertools.count()

        def generate(prompt_ids: list[list[int]], *args: Any) -> Any:
            number = next(iterations)
            assert prompt_ids == given.prompts[number]
            return (given.responses[number], None) if name == "grpo" else given.responses[number]

        trainer._generate_single_turn = generate
        run = online.over_iterations(trl_curves.trained(trainer, online.UPDATES))
    return run._replace(weights={f"policy/{path}": leaf for path, leaf in run.weights.items()})
