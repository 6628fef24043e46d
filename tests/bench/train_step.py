"""Training steps against PyTorch's: forward, backward and SGD with momentum, on a fixed batch."""

import argparse
import os
import sys

import figures

PEERS = {"resnext50_32x4d": "resnext50_32x4d", "regnety_800mf": "regnety_008"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer_python", required=True, help="one that has torch, timm, lightly")
    parser.add_argument("--steps", default="supervised,swav")
    parser.add_argument("--models", default=",".join(PEERS))
    parser.add_argument("--batches", default="16,64")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--native", action="store_true", help="beside XLA's own grouped form too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = arguments.device
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for step in arguments.steps.split(","):
        prefix = "train_step" if step == "supervised" else f"{step}_step"
        files = [str(figures.HERE / f"{prefix}_{side}.py") for side in ("ours", "peer")]
        for model in arguments.models.split(","):
            for batch in arguments.batches.split(","):
                rest = [batch, str(arguments.size)]
                ours = [sys.executable, files[0], model, *rest]
                peer = [arguments.peer_python, files[1], PEERS[model], *rest]
                workers = {"ours": [*ours, "auto"], "PyTorch": peer}
                if arguments.native:
                    workers["XLA's grouped form"] = [*ours, "native"]
                name = f"{prefix}/{model}/{arguments.size}px/b{batch}/{arguments.device}"
                found = figures.compare(name, "images/s", workers, int(batch), arguments.rounds)
                figures.write(found, figures.run())


if __name__ == "__main__":
    main()
