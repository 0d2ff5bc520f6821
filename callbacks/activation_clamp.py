"""Clamps on an activation: its norm, or its spread about the class means, set to what a control run had."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from callbacks.activation_reference import fitting_labels, labels_of, read_reference
from callbacks.base import StagedCallback, Stages, replace_first
from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.core.ensemble import member_call
from lightning_modules.core.reporting import ensemble_size
from lightning_modules.core.sites import match_modules


def clamp_radius(x: Tensor, radius: float | Tensor) -> Tensor:
    """x r/|x|: every position's norm set to `radius`; a zero vector has no direction and stays."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x * (radius / norm.where(norm > 0, 1.0)), x)


def clamp_mean_radius(x: Tensor, radius: float | Tensor) -> Tensor:
    """x r/m, m the mean norm over positions: one factor for all, so that norms keep their ratios; zeros stay."""
    mean = x.norm(dim=-1).mean()
    return x * torch.where(mean > 0, radius / mean.where(mean > 0, 1.0), 1.0)


def clamp_spread(x: Tensor, classes: Tensor, spread: float | Tensor) -> Tensor:
    """mu_c + (x - mu_c) s*/s: the within-class spread set to `spread`, the class means kept.

    s^2 = sum |x - mu_c|^2 / (N - C), over N positions of C classes. Where nothing varies within a class (s = 0, as when
    every class has one position) there is nothing to scale, and x stays. Makes no device synchronisation.

    Args:
        x: `[..., D]`.
        classes: Class of each position, `[...]`; positions of -100 belong to none and stay.
        spread: s*.
    """
    x_ND, classes_N = x.flatten(0, -2), classes.flatten()
    sorted_N, order_N = classes_N.sort()
    is_new_N = torch.cat([sorted_N.new_zeros(1), (sorted_N[1:] != sorted_N[:-1]).long()])
    # The classes that occur, renumbered from 0: a table of N rows then holds them, however many labels there are.
    row_N = torch.empty_like(classes_N).scatter_(0, order_N, is_new_N.cumsum(0))
    weight_N1 = (classes_N != IGNORE).to(x.dtype).unsqueeze(1)

    counts_N1 = torch.zeros_like(weight_N1).index_add(0, row_N, weight_N1)
    means_ND = torch.zeros_like(x_ND).index_add(0, row_N, x_ND * weight_N1) / counts_N1.clamp(min=1)
    deviation_ND = (x_ND - means_ND.index_select(0, row_N)) * weight_N1
    freedom = weight_N1.sum() - (counts_N1 > 0).sum()
    variance = deviation_ND.square().sum() / freedom.clamp(min=1)
    varies = variance > 0
    scale = torch.where(varies, spread / variance.where(varies, 1.0).sqrt(), 1.0)
    return (x_ND + (scale - 1) * deviation_ND).view_as(x)


class ActivationClamp(StagedCallback):
    """Replaces the output x of every module that matches `site`, differentiably and in at least fp32.

    - `naive`: x r*/|x|, the norm of every position set to the reference's mean radius r*.
    - `mean_preserving`: mu_c + (x - mu_c) s*/s, with mu_c the mean of the position's class in this batch and s the
      within-class spread of this batch, s^2 = sum |x - mu_c|^2 / (N - C), the trace of the pooled within-class
      covariance; s* is the reference's. Unlabelled positions stay as they are. The class is that of the target label,
      so a model can learn to spread out, be drawn to mu_c, and so be told what its batch knows of the label: its
      accuracy under the clamp can pass what its inputs allow; with `classes: batch` next to nothing is told.
    - `random_direction`: x + |x r*/|x| - x| u, u uniform on the sphere: the control for the size of the displacement.
    - `zero`: 0. `mean`: at each position, the mean over the batch. `shuffle`: another row's of the batch, so that every
      input gets what belongs to another. `identity`: the same tensor, bit for bit: the control for the machinery.

    Where the module returns a tuple, its first element is clamped. All modes but `mean_preserving` ignore the labels
    and act on every forward of their stages, generation included. `mean_preserving` acts in the steps of fit, validate
    and test alone: a generation has no labels, and its batches have statistics of their own. Under DDP each rank's
    batch has its own mu_c and s. Each member of an ensemble is clamped by itself, to its own control if the reference
    is of an ensemble.

    Args:
        site: Name pattern of the modules, see `lightning_modules.core.sites`.
        mode: What to do to x.
        reference: File that `ActivationReference` wrote in the control run, with this site's r* and s*.
        during: The stages in which the clamp acts; validation inside fit is `validate`. By default all.
        classes: `target`: as above. `batch`: all positions by one factor; `naive` is x r*/m with m the mean |x| of the
            batch, `mean_preserving` takes the labelled positions (every position, where the batch has no labels for
            this site) as one class.
        labels: The batch's key of the target labels, one a position of x.
        seed: Of the random directions, which also depend on step and rank, and are the same in a resumed run.

    Raises:
        UserError: At `setup`, if the reference does not exist.
        UserError: If the mode lacks its reference or `during` is empty; at `setup`, if the site matches nothing or the
            reference does not hold it; in a step, if classes are needed and the batch has no fitting labels.
    """

    def __init__(
        self,
        site: str,
        mode: Literal["naive", "mean_preserving", "random_direction", "zero", "mean", "shuffle", "identity"],
        reference: str | None = None,
        during: Stages | None = None,
        classes: Literal["target", "batch"] = "target",
        labels: str = "labels",
        seed: int = 0,
    ) -> None:
        uses_reference = mode in ("naive", "mean_preserving", "random_direction")
        if uses_reference and reference is None:
            raise UserError(f"ActivationClamp(mode={mode!r}) needs `reference`, a file from ActivationReference.")
        if reference is not None and not uses_reference:
            rank_zero_warn(f"ActivationClamp(mode={mode!r}) ignores `reference`.")
        super().__init__(during, ["fit", "validate", "test", "predict"], seed)
        self.site = site
        self.mode = mode
        self.reference = reference if uses_reference else None
        self.classes = classes
        self.labels = labels
        self._labels: Tensor | None = None
        self._targets: dict[Tensor, Tensor] = {}  # of ensembles, on the device
        self._training_in_step: bool | None = None

    @property
    def state_key(self) -> str:
        """Distinct for two clamps in one trainer."""
        return self._generate_state_key(site=self.site, mode=self.mode, during=self.during)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the site, reads its reference, and hooks on."""
        key = f"spread.{self.classes}" if self.mode == "mean_preserving" else "radius"
        modules = match_modules(pl_module, self.site)
        keys = [f"{name}.{key}" for name in modules]
        targets = read_reference(self.reference, keys, ensemble_size(pl_module)) if self.reference else []
        for index, module in enumerate(modules.values()):
            target = targets[index] if targets else None
            self._handles.append(module.register_forward_hook(self._hook(trainer, pl_module, index, target)))

    def _hook(self, trainer: Trainer, pl_module: LightningModule, index: int, target: Tensor | None) -> Any:
        # Compiled modules leave their graph here: the hook depends on the stage and on the step.
        @torch.compiler.disable
        def hook(module: nn.Module, args: Any, output: Tensor | tuple) -> Tensor | tuple:
            if self.mode == "identity" or not self._acts(trainer):
                return output
            if self.mode == "mean_preserving" and pl_module.training is not self._training_in_step:
                return output
            return replace_first(output, self.site, lambda x: self._clamp(x, index, self._own_target(target, x.device)))

        return hook

    def _own_target(self, target: Tensor | None, device: torch.device) -> Tensor | None:
        if target is None or target.dim() == 0:
            return target
        if target not in self._targets:
            self._targets[target] = target.to(device)  # once: a step would wait for the copy
        return self._targets[target][member_call().index]

    def _clamp(self, x: Tensor, index: int, target: Tensor | None) -> Tensor:
        match self.mode:
            case "naive":
                return clamp_radius(x, target) if self.classes == "target" else clamp_mean_radius(x, target)
            case "mean_preserving":
                call = member_call()
                labels = fitting_labels(call.labels if call else self._labels, x)
                if self.classes == "target" and labels is None:
                    raise UserError(
                        f"ActivationClamp at {self.site!r} needs the class of every position, but the batch has no "
                        f"{self.labels!r} of shape {tuple(x.shape[:-1])}."
                    )
                classes = labels
                if self.classes == "batch":
                    classes = x.new_zeros(x.shape[:-1], dtype=torch.long) if labels is None else labels.clamp(max=0)
                return clamp_spread(x, classes, target)
            case "random_direction":
                generator = self._generator(x, index)
                direction = torch.randn(x.shape, generator=generator, device=x.device)
                displacement = (clamp_radius(x, target) - x).norm(dim=-1, keepdim=True)
                return x + displacement * nn.functional.normalize(direction, dim=-1)
            case "zero":
                return torch.zeros_like(x)
            case "mean":
                return x.mean(0, keepdim=True).expand_as(x)
            case "shuffle":
                return x.roll(1, 0)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, loader: int = 0) -> None:
        super()._begin(trainer, pl_module, batch, batch_idx, loader)
        self._labels = labels_of(batch, self.labels)
        # Steps and evaluation by generation inside them are told apart by the mode: the latter switches to eval.
        self._training_in_step = pl_module.training

    def _end(self, *_: Any) -> None:
        self._labels = None
        self._training_in_step = None

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = _begin
    on_train_batch_end = on_validation_batch_end = on_test_batch_end = _end
