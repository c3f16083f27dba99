"""Parser of a command's arguments."""

import argparse
from typing import NoReturn

from rlhf_jax.types import RlhfError


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises RlhfError instead of printing the usage and exiting."""

    def __init__(self, prog: str, description: str) -> None:
        """Create a parser that does not accept abbreviated flags."""
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise RlhfError with the message and the usage."""
        raise RlhfError(f"{message}\n{self.format_usage().strip()}")
