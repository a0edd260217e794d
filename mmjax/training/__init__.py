"""The train loop: state, steps, optimizers, checkpoints, mesh."""
