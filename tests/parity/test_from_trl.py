# TRL is in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""The names in docs/how-to/from-trl.md that are said to be TRL's are TRL's; tests/test_site.py checks ours."""

import dataclasses
import re
from pathlib import Path

import pytest
import trl

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "from-trl.md").read_text(encoding="utf-8")
TABLES = dict(re.findall(r"^## (.*)\n((?:\n|\|.*\n)+)", PAGE, re.MULTILINE))
CONFIGS = {
    "Arguments of all trainers": (trl.SFTConfig,),
    "SFTConfig": (trl.SFTConfig,),
    "RewardConfig": (trl.RewardConfig,),
    "DPOConfig": (trl.DPOConfig,),
    "KTOConfig": (trl.KTOConfig,),
    "GRPOConfig and RLOOConfig": (trl.GRPOConfig, trl.RLOOConfig),
}


@pytest.mark.parametrize("heading", CONFIGS)
def test_names_of_trl_are_fields_of_its_configs(heading):
    fields = {field.name for config in CONFIGS[heading] for field in dataclasses.fields(config)}
    rows = TABLES[heading].strip().splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`([a-z_0-9]+)`", row.split("|")[1])}
    elsewhere = {"peft_config", "margin"}  # an argument of trainers, and a column
    assert rows and named - elsewhere <= fields
