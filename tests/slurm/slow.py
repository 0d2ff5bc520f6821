"""A callback that makes a run as slow as the test wants, without a difference in its config."""

import os
import time

from lightning.pytorch import Callback


class Slow(Callback):
    def on_train_batch_start(self, *arguments):
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))
