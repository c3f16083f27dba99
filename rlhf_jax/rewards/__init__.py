"""Where scores come from: learned judges of texts, lexicons, and reward networks."""
