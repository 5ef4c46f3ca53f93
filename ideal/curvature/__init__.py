"""Curvature of the mixture's loss: which layers are tracked, what is recorded, and how it is inverted."""
