"""What `data.max_tokens` does to the batches of a bridge: rows, tokens and padding of each batch of an epoch.

    python benchmarks/batches.py [--data gsm8k/train.jsonl] [--batch_size 32] [--max_tokens 8192] [--world 1]

It makes batches for the embedded pair and the bridge of `configs/telepathy_v15.yaml`, of generated problems or of the
problems in a file, with a number of rows and with a number of tokens. Tokens are those of the target's rows on one
device, padding included. Two batches have one shape if their rows, source positions and target positions are as many:
kernels that are planned or compiled for a shape are used again only where shapes are fewer than batches. The last
column is the deviation of the answer tokens of a batch over their mean: a loss that is a mean over the tokens of a
batch gives tokens in small batches so much more weight.
"""

import argparse
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from datamodules import WordProblems
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.telepathy import PerceiverBridge, Telepathy
from lightning_modules.telepathy.bridges import Bridge
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target

PAIR = Path(__file__).parents[1] / "assets" / "pair"
HEAD = "| batches of | batches | shapes | rows | tokens | largest over mean | padding | deviation of answer tokens |"


def bridge(source: Source, target: Target, key_norm: bool) -> Bridge:
    """Return the bridge of `configs/telepathy_v15.yaml`."""
    return PerceiverBridge(source, target, key_norm, soft_tokens=90, tokens_per_query=3, span=30, width=128, hidden=768)


def measure(module: Telepathy, world: int, **settings: Any) -> str:
    """Return a row of the table: the batches of rank zero in one epoch."""
    data = WordProblems(epoch_size=8000, validation_size=100, test_sets={"test": 1}, **settings)
    limits = {"overfit_batches": 0, "limit_train_batches": 1.0}
    trainer = SimpleNamespace(**limits, global_rank=0, world_size=world, lightning_module=module)
    cast(Any, data).trainer = trainer
    data.setup("fit")
    rows, tokens, padding, answers, shapes = [], [], 0, [], set()
    for batch in cast(Any, data.train_dataloader()):
        packing = batch["soft"]
        rows.append(len(packing.tokens_BT))
        tokens.append(packing.tokens_BT.numel())
        answers.append(len(packing.labels_N))
        padding += packing.padding
        shapes.add((batch["source_mask"].shape, packing.tokens_BT.shape))
    mean = statistics.mean(tokens)
    most = settings.get("max_tokens")
    name = f"{settings['batch_size']} rows" if most is None else f"{most} tokens"
    spread = statistics.pstdev(answers) / statistics.mean(answers)
    return (
        f"| {name} | {len(rows)} | {len(shapes)} | {min(rows)} to {max(rows)} | {min(tokens)} to {max(tokens)} | "
        f"{max(tokens) / mean:.2f} | {padding / sum(tokens):.1%} | {spread:.1%} |"
    )


def run() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file of problems; without it, they are generated")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_tokens", type=int, default=8192)
    parser.add_argument("--world", type=int, default=1, help="number of devices")
    options = parser.parse_args()
    torch.manual_seed(0)
    source, target = (Pretrained(str(PAIR / which)) for which in ("source", "target"))
    module = Telepathy(source, target, bridge, source_layer=1)
    given = {"source": "file", "path": options.data} if options.data else {}
    print(f"{HEAD}\n|{'---|' * HEAD.count(' |')}")
    print(measure(module, options.world, batch_size=options.batch_size, **given))
    print(measure(module, options.world, batch_size=1024, max_tokens=options.max_tokens, **given))


if __name__ == "__main__":
    run()
