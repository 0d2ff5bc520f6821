"""Tells whether what a module puts out still depends on the input."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.base import first_tensor
from callbacks.throughput import off_the_clock
from datamodules.errors import UserError
from lightning_modules.core.diversity import between_input_variance, cosine_matrix, effective_rank, mean_pairwise_cosine
from lightning_modules.core.sites import match_modules

SHOWN = 64  # inputs in the figure


class DiversityMonitor(Callback):
    """Logs how the outputs of one module differ between the inputs of a training batch, and reports their collapse.

    - `diversity/cosine`: mean cosine between the outputs for two inputs, all positions in one vector;
    - `diversity/between_input_variance`: share of the power that depends on the input, by position;
    - `diversity/effective_rank`: along how many directions outputs differ, at most the batch size less one;
    - `diversity/distinct`: share of different generated texts, where `QuickEval` found one;
    - a figure of the cosine matrix, at each end of validation and at the end of training, in loggers that take one.

    See `lightning_modules.core.diversity` for the formulas. Under DDP each rank measures its own batch, and numbers are
    means over ranks. Outputs have collapsed when the cosine is above `max_cosine` or the variance below
    `min_variance`, at `patience` checks in a row. Other steps are not slowed: nothing is kept or synchronised there.

    Args:
        site: Name pattern of the module, see `lightning_modules.core.sites`. It returns a tensor [B, ...], with the width
            last, or a tuple that begins with one; a boolean mask [B, K] in second place says which positions of
            [B, K, D] are real. Positions that are zero throughout are taken for padding, too.
        every_n_steps: Optimizer steps between checks.
        on_collapse: Warn, once an episode, or warn and stop the run.
        max_cosine: The largest healthy cosine.
        min_variance: The smallest healthy between-input variance.
        patience: Checks in a row that make a collapse.

    Raises:
        UserError: At `setup` for fit, if a number is not positive or the site is not one module; in a step, if the
            module returns something else.
    """

    def __init__(
        self,
        site: str = "bridge",
        every_n_steps: int = 100,
        on_collapse: Literal["warn", "stop"] = "warn",
        max_cosine: float = 0.98,
        min_variance: float = 0.02,
        patience: int = 3,
    ) -> None:
        self.site = site
        self.every_n_steps = every_n_steps
        self.on_collapse = on_collapse
        self.max_cosine = max_cosine
        self.min_variance = min_variance
        self.patience = patience
        self._handle: RemovableHandle | None = None
        self._reset()

    def _reset(self, step: int = 0) -> None:
        self._armed = False
        self._training_in_step: bool | None = None
        self._captured: tuple[Tensor, Tensor | None] | None = None
        self._matrix: tuple[int, Tensor] | None = None
        self._checked = self._started = step
        self._streak = 0
        self._told_unmeasured = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the site and hooks on."""
        if stage != "fit":
            return
        for name in ("every_n_steps", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"DiversityMonitor: `{name}` must be at least 1, got {getattr(self, name)}.")
        modules = match_modules(pl_module, self.site)
        if len(modules) > 1:
            names = ", ".join(map(repr, modules))
            raise UserError(f"DiversityMonitor watches one module, but {self.site!r} matches {names}.")
        (module,) = modules.values()

        # On every step, though most need none: a compiled module does not notice a hook that comes later.
        @torch.compiler.disable
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # Evaluation by generation inside a step switches to eval mode.
            if self._armed and pl_module.training is self._training_in_step:
                self._captured = _values_and_mask(output, self.site)

        self._handle = module.register_forward_hook(hook)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts on from where a resumed run stands."""
        self._reset(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decides whether the coming step is one to look at."""
        self._started = trainer.global_step
        self._armed = (self._started + 1) // self.every_n_steps > self._checked // self.every_n_steps
        self._training_in_step = pl_module.training

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures what was kept, once the optimizer has stepped."""
        armed, self._armed = self._armed, False
        captured, self._captured = self._captured, None
        if armed and trainer.global_step > self._started:
            self._checked = trainer.global_step
            self._check(trainer, captured)

    def _check(self, trainer: Trainer, captured: tuple[Tensor, Tensor | None] | None) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning's own scalars are logged at
        values = torch.full((3,), math.nan, device=trainer.strategy.root_device)
        if captured is not None:
            x_BKD = _positions(*captured)
            if len(x_BKD) > 1 and x_BKD.isfinite().all():
                x_BF = x_BKD.flatten(1)
                variance = between_input_variance(x_BKD, (x_BKD != 0).any(-1))
                values = torch.stack([mean_pairwise_cosine(x_BF), variance, effective_rank(x_BF)])
                self._matrix = step, cosine_matrix(x_BF[:SHOWN])
        # Every rank takes part, whatever it caught, and all come to the same decision.
        cosine, variance, rank = trainer.strategy.reduce(values, reduce_op="mean").tolist()
        if math.isnan(cosine):
            if not self._told_unmeasured:
                rank_zero_warn(
                    f"DiversityMonitor has nothing to measure at step {trainer.global_step}: {self.site!r} must be "
                    "called in the training step, on at least two inputs, and return finite numbers."
                )
            self._told_unmeasured = True
            return
        metrics = {"cosine": cosine, "between_input_variance": variance, "effective_rank": rank}
        if (distinct := trainer.callback_metrics.get("quick_eval/distinct")) is not None:
            metrics["distinct"] = float(distinct)
        metrics = {f"diversity/{name}": value for name, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        self._judge(trainer, cosine, variance)

    def _judge(self, trainer: Trainer, cosine: float, variance: float) -> None:
        collapsed = cosine > self.max_cosine or variance < self.min_variance
        self._streak = self._streak + 1 if collapsed else 0
        if self._streak == self.patience:
            rank_zero_warn(
                f"{self.site!r} puts out nearly the same for every input (step {trainer.global_step}: mean cosine "
                f"{cosine:.3f}, between-input variance {variance:.3f}); look at the scale of what enters it, since "
                "attention over tiny keys is uniform, and for a loss that a constant output satisfies."
            )
        if self._streak >= self.patience and self.on_collapse == "stop":
            trainer.should_stop = True

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kept, self._matrix = self._matrix, None
        if kept is None or not trainer.is_global_zero:
            return
        step, matrix = kept
        with off_the_clock(trainer):
            for logger in trainer.loggers:
                if add_figure := getattr(logger.experiment, "add_figure", None):
                    add_figure("diversity/cosine_matrix", figure(matrix.cpu()), global_step=step)

    on_validation_end = on_train_end = _draw

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hook off and lets go of what was kept."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._reset()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the hook off here too: Lightning skips `teardown` when a run fails."""
        self.teardown(trainer, pl_module, "fit")


def figure(matrix: Tensor) -> Any:
    """The cosine matrix as a matplotlib figure."""
    from matplotlib.figure import Figure  # not pyplot, which picks a backend and keeps figures; slow to import

    drawn = Figure(figsize=(5, 4), layout="constrained")
    axes = drawn.add_subplot(xlabel="input", ylabel="input", title="cosine between outputs")
    drawn.colorbar(axes.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest"), ax=axes)
    return drawn


def _values_and_mask(output: Any, site: str) -> tuple[Tensor, Tensor | None]:
    x = first_tensor(output, site).detach()
    second = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    is_mask = isinstance(second, Tensor) and second.dtype == torch.bool and second.shape == x.shape[:-1]
    return x, second if is_mask else None


def _positions(x: Tensor, mask: Tensor | None) -> Tensor:
    """x_BKD in at least fp32, zero where the mask is; a single vector an input is one position."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is not None:
        x = x.where(mask[..., None], 0.0)
    return x.reshape(len(x), -1, x.shape[-1] if x.ndim > 1 else 1)
