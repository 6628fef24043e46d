"""Training: one loop for all objectives, with mesh, optimiser, state, checkpoints and metrics."""
