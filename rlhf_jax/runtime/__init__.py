"""Execution of pure steps: devices, compiled programs, checkpoints, the loop, metric files and progress."""
