"""Sweep of the KL coefficient of the quickstart's PPO, selected on the validation split.

    rlhf-jax --config=kl_sweep --workdir=runs/kl_sweep --inputs=runs/quickstart

reads the stages before PPO from a finished quickstart, trains one PPO for each coefficient and compares them:
`Run("runs/kl_sweep").selection()` is the table on the validation split.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

KL_COEFS = {"ppo_04": 0.4, "ppo_02": 0.2, "ppo_01": 0.1, "ppo_005": 0.05}


def get_config(arg: str = "") -> ConfigDict:
    """Build the quickstart (or its smoke variant) with PPO at several coefficients instead of all other methods."""
    config = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"](arg)
    config.unlock()
    for name, kl_coef in KL_COEFS.items():
        config[name] = config.ppo.copy_and_resolve_references()
        config[name].kl_coef = kl_coef
    config.stages = ("gold", "sft", "preferences", "reward_model", *KL_COEFS, "evaluate")
    config.evaluate.policies = tuple(KL_COEFS)
    config.evaluate.best_of = ()
    return config.lock()
