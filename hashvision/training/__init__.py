"""One loop for every objective: mesh, optimiser, state, checkpoints, metrics."""

from typing import Any

# A locked ml_collections.ConfigDict with the schema of configs/base.py. Its keys are attributes
# that no type checker can see.
Config = Any
