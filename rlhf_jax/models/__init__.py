"""Networks: one decoder-only Flax (linen) transformer, and the policy, reward and value networks made of it."""
