"""Kinds of runs: what is computed in which order, over stages that a runner runs."""
