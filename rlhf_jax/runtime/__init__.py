"""Execution of training steps: devices, compiled programs, optimisers, checkpoints, the loop, files and progress."""
