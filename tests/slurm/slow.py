"""A callback that makes a run as slow as the test wants, without a difference in its config."""

import os
import time
from pathlib import Path

from lightning.pytorch import Callback


class Slow(Callback):
    def on_train_batch_start(self, *arguments):
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))

    def on_train_batch_end(self, trainer, *arguments):
        Path(trainer.default_root_dir, "began").touch()
