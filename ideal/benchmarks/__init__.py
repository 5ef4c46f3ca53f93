"""What a checkpoint can do, measured with lm-eval tasks and reasoning-gym's scorers."""
