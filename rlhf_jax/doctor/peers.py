"""Speeds of other libraries at the sizes that are measured on accelerators, on one H100 with 80 GB.

From `experiments/benchmarks/results/peers_h100.jsonl`: the fastest of each kind, in bfloat16 with random weights.
"""

from typing import NamedTuple


class Peer(NamedTuple):
    """The fastest library at a size."""

    name: str
    seconds: float  # of a batch of samples, an update, or an iteration


PEERS = {
    ("sampling", "S", 64): Peer("tunix 0.1.7", 0.2397),
    ("sampling", "S", 256): Peer("tunix 0.1.7", 0.4014),
    ("sampling", "L", 64): Peer("tunix 0.1.7", 0.3255),
    ("sampling", "L", 256): Peer("tunix 0.1.7", 0.6439),
    ("dpo", "S", 32): Peer("TRL 1.16, compiled", 0.1667),
    ("dpo", "L", 16): Peer("TRL 1.16, compiled", 0.3032),
    ("ppo", "S", 64): Peer("TRL 1.12", 6.0552),
    ("ppo", "L", 64): Peer("TRL 1.12", 4.6801),
}
"""Peers by stage, shape and rows."""
