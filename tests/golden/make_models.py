"""Makes the goldens of the models from PyTorch, for tests/models/test_models.py.

Run it from any folder, in an environment with torch, torchvision and timm (no JAX):

    python tests/golden/make_models.py

With `--counts` it writes nothing and prints published parameter counts instead. If a module called
`torchvision_cpu` is on PYTHONPATH it is imported first: it may register the operators without which
torchvision does not import beside a CPU build of torch.

Everything is computed in float64, so that the goldens carry no error of their own; the script
prints how far PyTorch's own float32 is from them.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

import weights_rule

# By name: this project does not depend on them, so neither the type checker nor a reader's editor
# should look for them.
torch = importlib.import_module("torch")
if importlib.util.find_spec("torchvision_cpu"):
    importlib.import_module("torchvision_cpu")
torchvision = importlib.import_module("torchvision")
timm = importlib.import_module("timm")

# Odd and not square, so that padding, striding and the order of height and width all show.
EVAL_SHAPE = (2, 57, 70, 3)
TRAIN_SHAPE = (4, 33, 38, 3)
TRAIN_BATCHES = 40  # drawn, of which one is kept
CHANNELS = 8  # kept of each stage's output
ROWS = 16  # output channels kept of each gradient

# Statistics and gradients kept from a training step, of every kind of parameter.
TRAIN = "timm_regnety_002"
STATISTICS = (
    "stem.bn",
    "s1.b1.conv2.bn",
    "s3.b1.downsample.bn",
    "s3.b3.conv2.bn",
    "s4.b7.conv3.bn",
)
GRADIENTS = (
    "stem.conv.weight",
    "s1.b1.conv2.conv.weight",
    "s2.b1.downsample.conv.weight",
    "s3.b2.se.fc1.weight",
    "s3.b3.conv2.conv.weight",
    "s4.b1.conv1.bn.weight",
    "s4.b7.conv3.conv.weight",
    "s4.b7.se.fc2.bias",
)


def networks() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Golden name -> (network without a head, the modules that are its stages)."""
    regnet_tv = torchvision.models.regnet_y_400mf()
    resnext = torchvision.models.resnext50_32x4d()
    regnet_tv.fc = resnext.fc = torch.nn.Identity()
    stages = ("s1", "s2", "s3", "s4")
    return {
        "timm_regnety_002": (timm.create_model("regnety_002", num_classes=0), stages),
        "timm_regnety_008": (timm.create_model("regnety_008", num_classes=0), stages),
        "torchvision_regnet_y_400mf": (
            regnet_tv,
            tuple(f"trunk_output.block{stage}" for stage in range(1, 5)),
        ),
        "torchvision_resnext50_32x4d": (resnext, ("layer1", "layer2", "layer3", "layer4")),
    }


def load_drawn(network: Any) -> dict[str, np.ndarray]:
    """Draws the network's weights; returns what the test needs to draw them again."""
    state = network.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    drawn = {
        name: torch.from_numpy(weights_rule.draw(name, tuple(state[name].shape))) for name in names
    }
    network.load_state_dict(drawn, strict=False)
    shapes = np.zeros((len(names), 4), np.int64)  # 0 where a tensor has fewer dimensions
    for row, name in enumerate(names):
        shapes[row, : state[name].ndim] = state[name].shape
    return {"names": np.array(names), "shapes": shapes}


def batch(name: str, shape: tuple[int, int, int, int], dtype: Any) -> Any:
    """The drawn images as (B, 3, H, W)."""
    images = weights_rule.images(name, shape).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images)).to(dtype)


def evaluate(network: Any, stages: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Features in evaluation mode, and of each stage's output the mean, deviation and a slice."""
    golden: dict[str, np.ndarray] = {}

    def keep(number: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            y = output.numpy().transpose(0, 2, 3, 1)
            golden[f"stage{number}_moments"] = np.array([y.mean(), y.std()])
            golden[f"stage{number}_slice"] = y[0, :, :, :CHANNELS]

        return hook

    hooks = [
        network.get_submodule(stage).register_forward_hook(keep(number))
        for number, stage in enumerate(stages, start=1)
    ]
    network.eval()
    images = batch("images", EVAL_SHAPE, torch.float64)
    with torch.no_grad():
        golden["features"] = network.double()(images).numpy()
        for hook in hooks:
            hook.remove()
        single = network.float()(images.float()).numpy()
    print("  deviation of stages", [f"{golden[f'stage{n}_moments'][1]:.3g}" for n in range(1, 5)])
    print(f"  deviation of features {golden['features'].std():.3g}")
    print(f"  PyTorch's float32 is off by {np.abs(single - golden['features']).max():.2g}")
    return golden


def farthest_from_kinks(network: Any) -> str:
    """The key of the training batch on which no ReLU's input can round across zero.

    One of 10^5 activations on the other side of a ReLU's kink changes a gradient by up to 1%, in
    PyTorch's own float32 as in ours, so that gradients cannot be compared on any batch. Of each
    batch we take the smallest input of a ReLU, in units of its layer's rounding error in float32.
    """
    inputs: list[Any] = []
    relu = torch.nn.functional.relu

    def recorded(x: Any, inplace: bool = False) -> Any:
        inputs.append(x.detach().double().clone())  # clone: ReLU works in place
        return relu(x, inplace=inplace)

    clearances = {}
    torch.nn.functional.relu = recorded
    try:
        for number in range(TRAIN_BATCHES):
            key = f"train images {number}"
            for dtype in (torch.float64, torch.float32):
                with torch.no_grad():
                    network.to(dtype).train()(batch(key, TRAIN_SHAPE, dtype))
            exact, rounded = inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]
            clearances[key] = min(
                float(x.abs().min() / (y - x).square().mean().sqrt())
                for x, y in zip(exact, rounded, strict=True)
            )
            inputs.clear()
    finally:
        torch.nn.functional.relu = relu
    key = max(clearances, key=lambda key: clearances[key])
    median = np.median(list(clearances.values()))
    print(f"  {key}: clear of kinks by {clearances[key]:.1f} roundings (median {median:.1f})")
    return key


def train(network: Any) -> dict[str, np.ndarray]:
    """Features, running statistics and gradients of one step in training mode."""
    key = farthest_from_kinks(network)
    golden, gradients = train_step(network, key, torch.float64)
    single, single_gradients = train_step(network, key, torch.float32)
    features, gradient = golden["train_features"], 0.0
    for name, exact in gradients.items():
        error = np.linalg.norm(single_gradients[name] - exact) / np.linalg.norm(exact)
        gradient = max(gradient, float(error))
    print(f"  PyTorch's float32 is off by {np.abs(single['train_features'] - features).max():.2g}")
    print(f"  and in gradients by {gradient:.2g} of their norm")
    return golden | {"train_key": np.array(key)}


def train_step(
    network: Any, key: str, dtype: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `train` keeps of one step, and all gradients."""
    golden: dict[str, np.ndarray] = {}
    load_drawn(network)
    network.to(dtype).train().zero_grad()
    features = network(batch(key, TRAIN_SHAPE, dtype))
    weights = weights_rule.uniform("loss", features.numel()).reshape(features.shape)
    loss = (features * torch.from_numpy(weights).to(dtype)).sum()
    loss.backward()
    golden["train_features"] = features.detach().numpy()
    golden["train_loss"] = np.array(loss.item())
    state = network.state_dict()
    for module in STATISTICS:
        for leaf in ("running_mean", "running_var"):
            golden[f"after/{module}.{leaf}"] = state[f"{module}.{leaf}"].numpy().copy()
    gradients = {n: p.grad.numpy().copy() for n, p in network.named_parameters()}
    golden["gradient_names"] = np.array(list(gradients))
    golden["gradient_norms"] = np.array([np.linalg.norm(g) for g in gradients.values()])
    for name in GRADIENTS:
        golden[f"gradient/{name}"] = gradients[name][:ROWS]
    return golden, gradients


def print_counts() -> None:
    """Parameters of the published networks: trunk, and with a head of 1000 classes."""

    def count(network: Any, head: tuple[str, ...]) -> None:
        sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
        trunk = sum(size for name, size in sizes.items() if not name.startswith(head))
        print(f"  {trunk:>13,} {sum(sizes.values()):>13,}")

    regnets = "002 004 008 016 032 080 160 320 640 1280 2560".split()
    with torch.device("meta"):
        for name in [f"regnety_{size}" for size in regnets]:
            print(f"timm {name}")
            count(timm.create_model(name), ("head.",))
        for name in ("resnet50", "resnext50_32x4d", "resnext101_32x8d"):
            print(f"torchvision {name}")
            count(getattr(torchvision.models, name)(), ("fc.",))
        for width in (16, 32, 48):
            print(f"torchvision ResNet, resnext101_32x{width}d")
            block = torchvision.models.resnet.Bottleneck
            settings = {"groups": 32, "width_per_group": width}
            count(torchvision.models.ResNet(block, [3, 4, 23, 3], **settings), ("fc.",))


def main() -> None:
    """Writes one .npz a network beside this file."""
    if "--counts" in sys.argv[1:]:
        return print_counts()
    torch.set_num_threads(1)
    for name, (network, stages) in networks().items():
        print(name)
        golden = load_drawn(network) | evaluate(network, stages)
        if name == TRAIN:
            golden |= train(network)
        path = Path(__file__).with_name(f"{name}.npz")
        arrays = {key: _single(value) for key, value in golden.items()}
        np.savez_compressed(path, **arrays)
        print(f"  {path.stat().st_size / 1000:.0f} kB")


def _single(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


if __name__ == "__main__":
    main()
