"""What makes a pure step a run: devices, compiled programs, checkpoints, the loop, metric files and progress."""
