"""What it takes to load a language model: seconds, and the largest memory of the process while it loads.

    python benchmarks/loading.py [--layers 8] [--width 1024]

Makes a Llama with random weights in a temporary folder, in shards of 50 MB, and loads it in processes of their own. The
memory of a process before it loads is subtracted. Pages of files that are mapped into memory count too, although the
system can take them back. `from_config` is the usual way of transformers to make random weights. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from lightning_modules.pretrained.loading import Pretrained

WAYS = {
    "from_config": "random weights, from_config",
    "random": "random weights, random_init",
    "whole": "the whole model",
    "quarter": "the first quarter of its layers",
}


def load(way: str, path: str, dtype: Literal["float32", "bfloat16"], layers: int) -> None:
    """Load in this process, and print seconds and bytes as JSON."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = Pretrained(path).load_config()
    before, began = _peak(), time.perf_counter()
    match way:
        case "from_config":
            make: Callable[..., torch.nn.Module] = AutoModelForCausalLM.from_config
            model = make(config, dtype=getattr(torch, dtype))
        case "quarter":
            model = Pretrained(path, dtype=dtype).load_first_layers([layers // 4])
        case _:
            model = Pretrained(path, random_init=way == "random", dtype=dtype).load_causal_lm()
    for parameter in model.parameters():
        parameter.sum()  # a weight that is mapped into memory is read when it is needed
    print(json.dumps({"seconds": time.perf_counter() - began, "bytes": _peak() - before}))


def _peak() -> int:
    # Not `getrusage`, which counts the parent's memory before the program was started
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def run() -> None:
    """Make the model, load it in every way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--load", nargs=3, metavar=("WAY", "FOLDER", "DTYPE"), help="load once in this process")
    options = parser.parse_args()
    if options.load:
        way, folder, dtype = options.load
        load(way, folder, dtype, options.layers)
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=options.width // 64, vocab_size=16000))
        model.save_pretrained(folder, max_shard_size="50MB")
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        print(f"{model.num_parameters() / 1e6:.0f} M parameters, {size / 2**20:.0f} MiB on disk\n")
        print("| what | dtype | seconds | memory, MiB |\n|---|---|---|---|")
        for dtype in ("float32", "bfloat16"):
            for way, what in WAYS.items():
                line = [sys.executable, __file__, "--layers", str(options.layers), "--load", way, folder, dtype]
                found = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)
                print(f"| {what} | {dtype} | {found['seconds']:.2f} | {found['bytes'] / 2**20:.0f} |")


if __name__ == "__main__":
    run()
