"""The training loop: module, schedule, checkpoints, processes."""
