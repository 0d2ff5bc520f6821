"""Evaluation by generation during training, on a few held-out samples."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from callbacks.base import EveryNSteps, check_positive, refuse_second
from callbacks.held_out import evaluation, validation_loader
from callbacks.throughput import off_the_clock
from datamodules.errors import UserError
from lightning_modules.core.contracts import SupportsSampleDataloader, SupportsSampleEval, connected
from lightning_modules.core.diversity import distinct, distinct_n
from lightning_modules.core.intervals import wilson_interval
from lightning_modules.core.reporting import add_text, is_dry_run, keep_scalars, log_scalars, logged_step, run_folder
from lightning_modules.core.samples import EvalSample, gather_dealt, text_table, write_jsonl


class QuickEval(Callback):
    """Generates answers to held-out samples every n optimizer steps, and logs their scores.

    The module's `sample_eval(batch) -> list[EvalSample]` makes the answers, in eval mode, without gradients, in the
    Trainer's precision. Over the samples of all ranks:

    - `quick_eval/<measure>`: mean of each measure in the scores, over the samples that have it. If all scores of a
      measure lie in [0, 1], `quick_eval/<measure>_low` and `_high` are its Wilson interval at 95 %;
    - `quick_eval/distinct`, `quick_eval/distinct_2`: fraction of distinct outputs, and of distinct pairs of words;
    - a table of some samples in loggers that take text, and all samples in `samples/quick_eval-<step>.jsonl`.

    The numbers go to every logger and into `trainer.callback_metrics`, where checkpoints and early stopping find them.
    The course of training is the same as without the callback: random states come back, and random numbers inside are
    the same at each evaluation. The time does not count in `Throughput`. Of a run that averages its weights (EMA), it
    measures those of training; validations measure the average.

    Example::

        trainer:
          callbacks+:
            - {class_path: QuickEval, init_args: {every_n_steps: 500, n_samples: 64}}

    Args:
        every_n_steps: Optimizer steps between evaluations.
        n_samples: Held-out samples over all ranks, the same ones at each evaluation. They come from the datamodule's
            `sample_dataloader(n_samples)`, which gives each rank a part, or else from the first validation loader,
            which must give each rank other samples.
        n_shown: Samples in the table. They are spread evenly, because loaders may sort by length.

    Raises:
        UserError: A number is not positive; at `setup`, there are two of these callbacks, or the module of a fit has no
            `sample_eval`; at the first evaluation, there is no held-out data.
    """

    def __init__(self, every_n_steps: int = 500, n_samples: int = 64, n_shown: int = 8) -> None:
        check_positive(self, every_n_steps=every_n_steps, n_samples=n_samples, n_shown=n_shown)
        self.every_n_steps = every_n_steps
        self.n_samples = n_samples
        self.n_shown = n_shown
        self._evaluations = EveryNSteps(every_n_steps)
        self._batches: list[object] | None = None  # collated once, on the CPU
        self._limit: int | None = None  # samples of this rank, None for all

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback, and a module without `sample_eval`."""
        refuse_second(trainer, self)
        if stage == "fit" and not isinstance(pl_module, SupportsSampleEval):
            raise UserError(f"QuickEval needs `sample_eval(batch)`, which {type(pl_module).__name__} does not have.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step at which the fit starts or resumes: that step is not evaluated again."""
        self._evaluations.start(trainer.global_step)
        self._batches = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Evaluate at the end of an interval."""
        if self._evaluations.advance(trainer.global_step):
            with off_the_clock(trainer):
                self._report(trainer, gather_dealt(self._evaluate(trainer, pl_module)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the batches."""
        self._batches = None

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> list[EvalSample]:
        """Return the samples of this rank."""
        assert isinstance(pl_module, SupportsSampleEval)  # see `setup`
        samples: list[EvalSample] = []
        batches = []
        with evaluation(trainer, pl_module):
            for index, batch in enumerate(self._batches or self._loader(trainer, pl_module)):
                torch.manual_seed(index * trainer.world_size + trainer.global_rank)
                batches.append(batch)
                samples += pl_module.sample_eval(_to_device(trainer, pl_module, batch))
                if self._limit is not None and len(samples) >= self._limit:
                    break
        self._batches = batches
        return samples[: self._limit]

    def _loader(self, trainer: Trainer, pl_module: LightningModule) -> Iterable[object]:
        """Return the held-out batches of this rank, and set how many samples to take from them."""
        owner = connected(trainer).datamodule or pl_module
        if isinstance(owner, SupportsSampleDataloader):
            self._limit = None
            return owner.sample_dataloader(self.n_samples)
        self._limit = len(range(trainer.global_rank, self.n_samples, trainer.world_size))
        return validation_loader(trainer, pl_module, "QuickEval")

    def _report(self, trainer: Trainer, samples: list[EvalSample]) -> None:
        folder = run_folder(trainer)
        metrics = {f"quick_eval/{name}": value for name, value in summary(samples).items()}
        log_scalars(trainer, metrics)
        for name in [name for name in trainer.callback_metrics if name.startswith("quick_eval/")]:
            del trainer.callback_metrics[name]  # a score that no sample has now, such as that of wrong answers
        keep_scalars(trainer, metrics)
        if trainer.is_global_zero and not is_dry_run(trainer):
            shown = samples[:: max(len(samples) // self.n_shown, 1)][: self.n_shown]
            add_text(trainer, "quick_eval/samples", text_table(shown), logged_step(trainer))
            write_jsonl(folder / "samples" / f"quick_eval-{trainer.global_step}.jsonl", samples)


def summary(samples: Sequence[EvalSample]) -> dict[str, float]:
    """Return the mean of each measure over the samples that have it, intervals of proportions, and `distinct`."""
    metrics = {}
    for measure in sorted({name for sample in samples for name in sample.scores}):
        scores = [sample.scores[measure] for sample in samples if measure in sample.scores]
        metrics[measure] = sum(scores) / len(scores)
        if all(0 <= score <= 1 for score in scores):
            metrics[f"{measure}_low"], metrics[f"{measure}_high"] = wilson_interval(sum(scores), len(scores))
    outputs = [sample.output for sample in samples]
    return metrics | {"distinct": distinct(outputs), "distinct_2": distinct_n(outputs, 2)}


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: object) -> Any:
    # The transfer of Lightning's evaluation loop, with the hooks of the module and the datamodule.
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)
