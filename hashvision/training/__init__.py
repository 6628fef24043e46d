"""One loop for every objective: mesh, optimiser, state, checkpoints, metrics."""

from typing import Any

# A locked ml_collections.ConfigDict with the keys of hashvision/schema.py. Its keys are attributes
# that no type checker can see.
Config = Any
