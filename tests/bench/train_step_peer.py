"""A worker of train_step.py: the same step in PyTorch with timm's network, channels last.

python tests/bench/train_step_peer.py MODEL BATCH SIZE, in a Python with torch and timm. On a CUDA
GPU the network is compiled and runs in bfloat16.
"""

import contextlib
import sys

with contextlib.suppress(ImportError):
    import torchvision_cpu  # noqa: F401 - a stand-in where torchvision has no CPU build
import timm
import torch

from serve import serve


def main(name: str, batch: str, size: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = {"memory_format": torch.channels_last}
    model = timm.create_model(name, num_classes=0).to(device, **layout).train()
    images = torch.randn(int(batch), 3, int(size), int(size)).to(device, **layout)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    forward = torch.compile(model) if device == "cuda" else model

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            features = forward(images)
        features.float().logsumexp(1).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    serve(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
