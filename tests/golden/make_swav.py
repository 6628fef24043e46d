"""Makes the golden of SwAV's codes and loss from PyTorch, for tests/objectives/test_swav.py.

Run it from any folder, in an environment with torch and lightly (no JAX):

    python tests/golden/make_swav.py

The scores are random; codes and losses are those of lightly.loss.SwaVLoss, which carries the
authors' code (facebookresearch/swav, main_swav.py), in float32 as published.
"""

import importlib
import importlib.util
from pathlib import Path

import numpy as np

torch = importlib.import_module("torch")
if importlib.util.find_spec("torchvision_cpu"):
    importlib.import_module("torchvision_cpu")
lightly = importlib.import_module("lightly.loss.swav_loss")

PHOTOS, PROTOTYPES, WIDTH, QUEUE = 32, 12, 16, 64


def main() -> None:
    """Writes swav.npz beside this file."""
    rng = np.random.default_rng(0)

    def unit(*shape: int) -> np.ndarray:
        x = rng.standard_normal((*shape, WIDTH))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    prototypes = unit(PROTOTYPES)
    arrays = {
        name: (unit(crops, photos) @ prototypes.T).astype(np.float32)
        for name, crops, photos in (("high", 2, PHOTOS), ("low", 4, PHOTOS), ("queue", 2, QUEUE))
    }
    high, low, queue = (
        [torch.from_numpy(scores) for scores in arrays[name]] for name in ("high", "low", "queue")
    )
    for epsilon, iterations in ((0.05, 3), (0.02, 10)):
        loss = lightly.SwaVLoss(
            temperature=0.1, sinkhorn_iterations=iterations, sinkhorn_epsilon=epsilon
        )
        name = f"{epsilon}-{iterations}"
        codes = lightly.sinkhorn(high[0], iterations=iterations, epsilon=epsilon)
        arrays[f"codes-{name}"] = codes.numpy()
        arrays[f"loss-{name}"] = loss(high, low).numpy()
        arrays[f"queue-{name}"] = loss(high, low, queue).numpy()
    np.savez(Path(__file__).parent / "swav.npz", **arrays)


if __name__ == "__main__":
    main()
