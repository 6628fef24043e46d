"""One loop for every objective: mesh, optimiser, state, checkpoints, metrics."""
