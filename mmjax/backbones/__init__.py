"""Encoders and the loaders of their published checkpoints."""
