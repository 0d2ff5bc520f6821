"""Evaluation by generation amid training, on a few held-out samples."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from callbacks.throughput import off_the_clock
from datamodules.errors import UserError
from lightning_modules.core.diversity import distinct, distinct_n
from lightning_modules.core.metrics import wilson_interval
from lightning_modules.core.samples import EvalSample, gather_objects, text_table, write_jsonl


class QuickEval(Callback):
    """Generates answers to held-out samples every N optimizer steps, and logs what they are worth.

    The module's `sample_eval(batch) -> list[EvalSample]` makes the answers, in eval mode, without gradients, in the
    Trainer's precision. Over the samples of all ranks:

    - `quick_eval/<measure>`: the mean of every measure among the scores, over the samples that have it; where scores
      lie in [0, 1], `quick_eval/<measure>_low` and `_high` are its Wilson interval at 95 %;
    - `quick_eval/distinct`, `quick_eval/distinct_2`: the share of different outputs, and of different pairs of words;
    - a text table of some samples in loggers that take text, and all of them in `samples/quick_eval-<step>.jsonl`.

    The numbers go to every logger and into `trainer.callback_metrics`, where checkpoints and early stopping find them.
    Training takes the same course as without: random states are put back, and random draws made here are the same at
    each evaluation. The time is left out of `Throughput`.

    Args:
        every_n_steps: Optimizer steps between evaluations.
        n_samples: Held-out samples, over all ranks, always the same ones. They come from the datamodule's
            `sample_dataloader(n_samples)`, which gives each rank its share; without one, from the first validation
            loader, whose ranks have to have shares of their own.
        n_shown: Samples in the text table, spread evenly, for loaders may sort by length.

    Raises:
        UserError: At `setup` for fit, if a number is not positive or the module has no `sample_eval`; at the first
            evaluation, if there is no held-out data.
    """

    def __init__(self, every_n_steps: int = 500, n_samples: int = 64, n_shown: int = 8) -> None:
        self.every_n_steps = every_n_steps
        self.n_samples = n_samples
        self.n_shown = n_shown
        self._batches: list[Any] | None = None  # collated once, on the CPU
        self._share: int | None = None  # samples to take of them, None for all
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what could only fail in mid-training."""
        if stage != "fit":
            return
        for name in ("every_n_steps", "n_samples", "n_shown"):
            if getattr(self, name) < 1:
                raise UserError(f"QuickEval: `{name}` must be at least 1, got {getattr(self, name)}.")
        if not callable(getattr(pl_module, "sample_eval", None)):
            raise UserError(f"QuickEval needs `sample_eval(batch)`, which {type(pl_module).__name__} does not have.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts on from where a resumed run stands, so that its last step is not evaluated twice."""
        self._last_step = trainer.global_step
        self._batches = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates where an interval ends."""
        step, last, self._last_step = trainer.global_step, self._last_step, trainer.global_step
        if step // self.every_n_steps > last // self.every_n_steps:
            with off_the_clock(trainer):
                shares = gather_objects(self._evaluate(trainer, pl_module))
                # Dealt back into the order that sharing them rank by rank took apart
                dealt = [sample for row in zip_longest(*shares) for sample in row if sample is not None]
                self._report(trainer, dealt)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the batches."""
        self._batches = None

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> list[EvalSample]:
        """This rank's samples."""
        samples, batches = [], []
        # Making a loader's iterator draws from the random state, so the batches are fetched in here too.
        with isolate_rng(), eval_mode(pl_module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            for index, batch in enumerate(self._batches or self._loader(trainer, pl_module)):
                torch.manual_seed(index * trainer.world_size + trainer.global_rank)
                batches.append(batch)
                samples += pl_module.sample_eval(_to_device(trainer, pl_module, batch))
                if self._share is not None and len(samples) >= self._share:
                    break
        self._batches = batches
        return samples[: self._share]

    def _loader(self, trainer: Trainer, pl_module: LightningModule) -> Iterable:
        """This rank's held-out batches; sets how many samples to take of them."""
        owner = trainer.datamodule or pl_module
        if hasattr(owner, "sample_dataloader"):
            self._share = None
            return owner.sample_dataloader(self.n_samples)
        loaders = owner.val_dataloader() if is_overridden("val_dataloader", owner) else trainer.val_dataloaders
        if loaders is None:
            raise UserError("QuickEval found no held-out data: neither `sample_dataloader` nor validation data.")
        self._share = len(range(trainer.global_rank, self.n_samples, trainer.world_size))
        return CombinedLoader(loaders, "sequential").flattened[0]

    def _report(self, trainer: Trainer, samples: list[EvalSample]) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir is a collective: asked for on all ranks
        metrics = {f"quick_eval/{name}": value for name, value in summary(samples).items()}
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning's own scalars are logged at
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        shown = samples[:: max(len(samples) // self.n_shown, 1)][: self.n_shown]
        for logger in trainer.loggers:
            if add_text := getattr(logger.experiment, "add_text", None):
                add_text("quick_eval/samples", text_table(shown), global_step=step)
        write_jsonl(Path(folder, "samples", f"quick_eval-{trainer.global_step}.jsonl"), samples)


def summary(samples: Sequence[EvalSample]) -> dict[str, float]:
    """Mean of every measure over the samples that have it, with its interval where it is a proportion, and spread."""
    metrics = {}
    for measure in sorted({name for sample in samples for name in sample.scores}):
        scores = [sample.scores[measure] for sample in samples if measure in sample.scores]
        metrics[measure] = sum(scores) / len(scores)
        if all(0 <= score <= 1 for score in scores):
            metrics[f"{measure}_low"], metrics[f"{measure}_high"] = wilson_interval(sum(scores), len(scores))
    outputs = [sample.output for sample in samples]
    return metrics | {"distinct": distinct(outputs), "distinct_2": distinct_n(outputs, 2)}


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """As Lightning's evaluation loop does it, with the hooks of module and datamodule."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode, and then each submodule's own mode again: frozen ones are in eval mode throughout."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
