import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # everything here is built from random numbers
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    # What torch and transformers deprecate among themselves is not ours to mend.
    config.addinivalue_line("filterwarnings", "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.parity)
