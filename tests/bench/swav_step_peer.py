"""A worker of train_step.py: SwAV's step in PyTorch, with timm's network and lightly's SwAV.

python tests/bench/swav_step_peer.py MODEL BATCH SIZE, in a Python with torch, timm and lightly. On
a CUDA GPU the network is compiled and runs in bfloat16.
"""

import contextlib
import sys

with contextlib.suppress(ImportError):
    import torchvision_cpu  # noqa: F401 - a stand-in where torchvision has no CPU build
import timm
import torch
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

from serve import serve


def main(name: str, batch: str, size: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = {"memory_format": torch.channels_last}
    trunk = timm.create_model(name, num_classes=0).to(device, **layout).train()
    head = SwaVProjectionHead(trunk.num_features, 2048, 128).to(device)
    prototypes = SwaVPrototypes(128, 2 * int(batch)).to(device)
    loss = SwaVLoss(sinkhorn_iterations=3, sinkhorn_epsilon=0.05)
    crops = [
        torch.randn(count * int(batch), 3, side, side).to(device, **layout)
        for count, side in ((2, int(size)), (4, int(size) // 2))
    ]
    modules = torch.nn.ModuleList([trunk, head, prototypes])
    optimiser = torch.optim.SGD(modules.parameters(), 0.1, momentum=0.9)
    forward = torch.compile(trunk) if device == "cuda" else trunk

    def step() -> None:
        prototypes.normalize()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            projected = head(torch.cat([forward(each) for each in crops]))
        projected = torch.nn.functional.normalize(projected.float(), dim=1)
        scores = prototypes(projected).chunk(6)
        loss(list(scores[:2]), list(scores[2:])).backward()
        optimiser.step()
        optimiser.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    serve(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
