"""Monitors whether the output of a module still depends on the input.

Shapes: B inputs, K positions, D width, F features.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from callbacks.base import EveryNSteps, check_positive, refuse_second
from callbacks.hooks import HookedCallback, eager, first_tensor
from callbacks.throughput import off_the_clock
from datamodules.errors import UserError, check_numbers
from lightning_modules.core.diversity import between_input_variance, cosine_matrix, effective_rank, mean_pairwise_cosine
from lightning_modules.core.reporting import add_figure, ensemble_size, keep_scalars, log_scalars, logged_step
from lightning_modules.core.sites import match_modules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INPUTS_IN_FIGURE = 64


class DiversityMonitor(HookedCallback):
    """Logs how the outputs of one module differ between the inputs of a training batch, and reports their collapse.

    - `diversity/cosine`: mean cosine between the outputs for two inputs, with all positions in one vector;
    - `diversity/between_input_variance`: fraction of the power that depends on the input, by position;
    - `diversity/effective_rank`: number of directions along which outputs differ, at most B - 1;
    - `diversity/distinct`: fraction of distinct generated texts, if `QuickEval` measured it;
    - a figure of the cosine matrix, after each validation and after training, in loggers that take figures.

    `lightning_modules.core.diversity` has the formulas. Under DDP each rank measures its own batch, and the numbers are
    means over ranks. Outputs have collapsed when the cosine is above `max_cosine` or the variance below `min_variance`
    at `patience` checks in a row; checkpoints hold the number so far. The monitor does not slow other steps: it keeps
    and synchronises nothing there.

    Example::

        trainer:
          callbacks+:
            - {class_path: DiversityMonitor, init_args: {site: soft_tokens, every_n_steps: 200, on_collapse: stop}}

    Args:
        site: Name pattern of the module, see `lightning_modules.core.sites`. The module returns a tensor [B, ...] with
            the width last, or a tuple that begins with one. A boolean mask [B, K] as second element says which
            positions of [B, K, D] are real. Positions where all features are zero count as padding too.
        every_n_steps: Optimizer steps between checks.
        on_collapse: `warn` once per collapse, or warn and `stop` the run.
        max_cosine: The largest healthy cosine.
        min_variance: The smallest healthy between-input variance.
        patience: Number of checks in a row that make a collapse.

    Raises:
        UserError: A number is out of range; at `setup`, there are two of these callbacks, or for fit the site is not
            one module or the model is an ensemble; in a step, the module returns no tensor.
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
        super().__init__()
        check_positive(self, every_n_steps=every_n_steps, patience=patience)
        check_numbers("DiversityMonitor", -1, max_cosine=max_cosine)
        check_numbers("DiversityMonitor", 0, 1, min_variance=min_variance)
        self.site = site
        self.every_n_steps = every_n_steps
        self.on_collapse = on_collapse
        self.max_cosine = max_cosine
        self.min_variance = min_variance
        self.patience = patience
        self._checks = EveryNSteps(every_n_steps)
        self._resumed_streak = 0  # that of a checkpoint
        self._reset(0)

    def _reset(self, step: int) -> None:
        self._checks.start(step)
        self._step_before = step
        self._armed = False
        self._training_in_step: bool | None = None
        self._captured: tuple[Tensor, Tensor | None] | None = None
        self._matrix: tuple[int, Tensor] | None = None  # the step, and the cosine matrix
        self._streak = self._resumed_streak = 0  # checks in a row that found a collapse
        self._has_warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback of the class, and add a hook to the module."""
        refuse_second(trainer, self)
        if stage != "fit":
            return
        if (members := ensemble_size(pl_module)) > 1:
            raise UserError(f"DiversityMonitor reads a single model: set model.ensemble to 1, not {members}")
        modules = match_modules(pl_module, self.site, "DiversityMonitor.site")
        if len(modules) > 1:
            names = ", ".join(map(repr, modules))
            raise UserError(f"DiversityMonitor watches one module, but {self.site!r} matches {names}.")
        (module,) = modules.values()

        def hook(module: nn.Module, args: object, output: object) -> None:
            # Generation inside a step switches to eval mode.
            if self._armed and pl_module.training is self._training_in_step:
                self._captured = _values_and_mask(output, self.site)

        # The hook is there on every step, though most need none: a compiled module ignores hooks that come later.
        self._handles = [module.register_forward_hook(eager(hook, lambda: not self._armed))]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step at which the fit starts or resumes."""
        streak = self._resumed_streak
        self._reset(trainer.global_step)
        self._streak = streak

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Decide whether to keep the outputs of this step."""
        self._step_before = trainer.global_step
        self._armed = self._checks.due(self._step_before + 1)
        self._training_in_step = pl_module.training

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Measure the outputs, if the optimizer has made its step."""
        armed, self._armed = self._armed, False
        captured, self._captured = self._captured, None
        if armed and trainer.global_step > self._step_before:
            self._checks.advance(trainer.global_step)
            self._check(trainer, captured)

    def _check(self, trainer: Trainer, captured: tuple[Tensor, Tensor | None] | None) -> None:
        values = torch.full((3,), math.nan, device=trainer.strategy.root_device)
        if captured is not None:
            x_BKD = _positions(*captured)
            if len(x_BKD) > 1 and x_BKD.isfinite().all():
                x_BF = x_BKD.flatten(1)
                variance = between_input_variance(x_BKD, (x_BKD != 0).any(-1))
                values = torch.stack([mean_pairwise_cosine(x_BF), variance, effective_rank(x_BF)])
                self._matrix = logged_step(trainer), cosine_matrix(x_BF[:INPUTS_IN_FIGURE])
        # Every rank takes part, with or without values, and all ranks come to the same decision.
        cosine, variance, rank = cast(Tensor, trainer.strategy.reduce(values, reduce_op="mean")).tolist()
        if math.isnan(cosine):
            self._warn_once(trainer.global_step)
            return
        metrics = {"cosine": cosine, "between_input_variance": variance, "effective_rank": rank}
        if (distinct := trainer.callback_metrics.get("quick_eval/distinct")) is not None:
            metrics["distinct"] = float(distinct)
        metrics = {f"diversity/{name}": value for name, value in metrics.items()}
        log_scalars(trainer, metrics)
        keep_scalars(trainer, metrics)
        self._judge(trainer, cosine, variance)

    def _warn_once(self, step: int) -> None:
        if not self._has_warned:
            rank_zero_warn(
                f"DiversityMonitor has nothing to measure at step {step}: {self.site!r} must be called in the training "
                "step, on at least two inputs, and return finite numbers."
            )
        self._has_warned = True

    def _judge(self, trainer: Trainer, cosine: float, variance: float) -> None:
        collapsed = cosine > self.max_cosine or variance < self.min_variance
        self._streak = self._streak + 1 if collapsed else 0
        if self._streak == self.patience:
            rank_zero_warn(
                f"{self.site!r} returns nearly the same for every input (step {trainer.global_step}: mean cosine "
                f"{cosine:.3f}, between-input variance {variance:.3f}). Look at the scale of its input, because "
                "attention over tiny keys is uniform, and for a loss that a constant output satisfies."
            )
        if self._streak >= self.patience and self.on_collapse == "stop":
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last cosine matrix."""
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last cosine matrix."""
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        last, self._matrix = self._matrix, None
        if last is not None and trainer.is_global_zero:
            step, matrix = last
            with off_the_clock(trainer):
                add_figure(trainer, "diversity/cosine_matrix", figure(matrix.cpu()), step)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of checks in a row that found a collapse."""
        return {"streak": self._streak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep that number until training starts."""
        self._resumed_streak = int(state_dict["streak"])

    def _release(self) -> None:
        super()._release()
        self._reset(0)


def figure(matrix: Tensor) -> "Figure":
    """Return a figure of a cosine matrix, readable at the size at which TensorBoard shows it."""
    from matplotlib.figure import Figure  # unlike pyplot, it picks no backend and keeps no figures

    drawing = Figure(figsize=(4.8, 4), layout="constrained")
    axes = drawing.add_subplot()
    axes.set_title("cosine between outputs", fontsize=14)
    axes.set_xlabel("input", fontsize=13)
    axes.set_ylabel("input", fontsize=13)
    image = axes.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    axes.locator_params(nbins=5, integer=True)
    bar = drawing.colorbar(image, ax=axes, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_label("cosine", fontsize=13)
    for each in (axes, bar.ax):
        each.tick_params(labelsize=12)
    return drawing


def _values_and_mask(output: object, site: str) -> tuple[Tensor, Tensor | None]:
    x = first_tensor(output, site).detach()
    second = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    is_mask = isinstance(second, Tensor) and second.dtype == torch.bool and second.shape == x.shape[:-1]
    return x, second if is_mask else None


def _positions(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x_BKD in at least fp32, zero where the mask is false; one vector per input is one position."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is not None:
        x = x.where(mask[..., None], 0.0)
    return x.reshape(len(x), -1, x.shape[-1] if x.ndim > 1 else 1)
