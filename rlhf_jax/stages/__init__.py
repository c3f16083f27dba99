"""The kinds of stages that an experiment is made of: read inputs, call a method, leave outputs. One file each."""
