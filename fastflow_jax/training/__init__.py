"""Training steps and loops, checkpoints, signals."""
