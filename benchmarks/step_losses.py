"""Whether a run on several devices has the losses of the run on one.

    python main.py fit --config CONFIG --trainer.callbacks+ \\
        '{class_path: benchmarks.step_losses.StepLosses, init_args: {file: one.json}}'
    python -m benchmarks.step_losses one.json two.json
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback, LightningModule
from torch import Tensor


class StepLosses(Callback):
    """Writes the loss of every step, a mean over all devices, to a file when training ends.

    Args:
        file: The file; a list of numbers in JSON.
    """

    def __init__(self, file: str):
        self.file, self.losses = file, list[Tensor]()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        """Keep the loss on the device."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        self.losses.append(trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if trainer.is_global_zero:
            Path(self.file).write_text(json.dumps(torch.stack(self.losses).double().tolist()))


def main() -> None:
    """Print the losses of two runs side by side, and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs=2, type=Path, help="files of StepLosses, of as many steps")
    files = parser.parse_args().files
    first, second = (json.loads(file.read_text()) for file in files)
    print(f"| step | {files[0]} | {files[1]} | difference |\n|---|---|---|---|")
    for step, (one, two) in enumerate(zip(first, second, strict=True), 1):
        print(f"| {step} | {one:.6f} | {two:.6f} | {two - one:+.1e} |")
    print(f"\nlargest difference: {max(abs(one - two) for one, two in zip(first, second, strict=True)):.1e}")


if __name__ == "__main__":
    main()
