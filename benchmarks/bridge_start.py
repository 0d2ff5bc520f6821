"""Seconds to make a large bridge: all of it, and its orthogonal matrices alone.

    python benchmarks/bridge_start.py [--width 4096] [--device cuda]

The bridge is that of `presets/telepathy/llama31_mistral7b.yaml` at this width: four layers that read three layers of
the source. With a GPU it is made twice: with its matrices decomposed on the CPU, then on the GPU.
"""

import argparse
import time
from types import SimpleNamespace
from typing import Any

import torch

from lightning_modules.pretrained.loading_device import loading_to
from lightning_modules.telepathy import PerceiverBridge
from lightning_modules.telepathy.orthogonal import orthogonal_

DEPTH, LAYERS_READ = 4, 3


def measure(width: int, device: torch.device) -> tuple[float, float, int]:
    """Return the seconds of the bridge and of its orthogonal matrices, and the number of parameters."""
    source, target = SimpleNamespace(width=LAYERS_READ * width), SimpleNamespace(width=width)
    sizes: dict[str, Any] = {
        "soft_tokens": 128,
        "span": 192,
        "depth": DEPTH,
        "heads": 32,
        "width": width,
        "hidden": width,
    }
    with loading_to(device):
        orthogonal_(torch.empty(8, 8))  # the device starts its libraries
        began = time.perf_counter()
        bridge = PerceiverBridge(source, target, **sizes).to(device)
        synchronise(device)
        whole, began = time.perf_counter() - began, time.perf_counter()
        for _ in range(DEPTH):
            orthogonal_(torch.empty(width, LAYERS_READ * width))
            orthogonal_(torch.empty(width, width))
        return whole, time.perf_counter() - began, sum(parameter.numel() for parameter in bridge.parameters())


def synchronise(device: torch.device) -> None:
    """Wait for the work that was given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    print("| decomposed on | parameters, M | seconds | of these orthogonal |\n|---|---|---|---|")
    for name in dict.fromkeys(["cpu", options.device]):
        whole, orthogonal, parameters = measure(options.width, torch.device(name))
        print(f"| {name} | {parameters / 1e6:.0f} | {whole:.1f} | {orthogonal:.1f} |")


if __name__ == "__main__":
    run()
