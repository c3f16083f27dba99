"""Models that several commands run with."""

import pytest

from tests.support import checkpoints


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Flags of `best-of-n`: a policy, a reward model, and three short answers a prompt."""
    directory = tmp_path_factory.mktemp("checkpoints")
    policy, judge = checkpoints.policy(directory / "policy"), checkpoints.reward_model(directory / "judge")
    return [f"--model={policy}", f"--reward-model={judge}", "--max-new-tokens=6", "--n=3", "--batch-size=2"]
