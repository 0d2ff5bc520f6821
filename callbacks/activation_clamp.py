"""Clamps on an activation: its norm, or its spread about the class means, set to the value of a control run."""

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.activation_reference import fitting_labels, labels_of, read_reference
from callbacks.hooks import InterveningCallback, Stages, eager, replace_first
from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.core.ensemble import member_call
from lightning_modules.core.reporting import ensemble_size
from lightning_modules.core.sites import match_modules


def clamp_radius(x: Tensor, radius: float | Tensor) -> Tensor:
    """Return x r/|x|, so that the norm at every position is `radius`; zero vectors have no direction and stay."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x * (radius / norm.where(norm > 0, 1.0)), x)


def clamp_mean_radius(x: Tensor, radius: float | Tensor) -> Tensor:
    """Return x r/m, with m the mean norm over positions: one factor for all, so norms keep their ratios; zeros stay."""
    mean = x.norm(dim=-1).mean()
    return x * torch.where(mean > 0, radius / mean.where(mean > 0, 1.0), 1.0)


def clamp_spread(x: Tensor, classes: Tensor, spread: float | Tensor) -> Tensor:
    """Return mu_c + (x - mu_c) s*/s: the within-class spread becomes s* = `spread`, and the class means mu_c stay.

    s^2 = sum |x - mu_c|^2 / (N - C), over N positions of C classes. Where nothing varies within a class (s = 0, as when
    every class has one position) x stays. The function does not synchronise the device.

    Args:
        x: Activations, `[..., D]`.
        classes: Class of each position, `[...]`. Positions of -100 belong to no class and stay.
        spread: s*.
    """
    x_ND, classes_N = x.flatten(0, -2), classes.flatten()
    sorted_N, order_N = classes_N.sort()
    is_new_N = torch.cat([sorted_N.new_zeros(1), (sorted_N[1:] != sorted_N[:-1]).long()])
    # Classes are renumbered from 0 in the order of their labels: a table of N rows holds them, whatever the labels are.
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


class ActivationClamp(InterveningCallback):
    """Replaces the output x of every module that matches `site`, differentiably and in at least fp32.

    - `naive`: x r*/|x|, so that the norm at every position is the reference's mean radius r*.
    - `mean_preserving`: mu_c + (x - mu_c) s*/s, with mu_c the mean of the position's class in this batch and s the
      within-class spread of this batch, s^2 = sum |x - mu_c|^2 / (N - C), the trace of the pooled within-class
      covariance. s* is the spread of the reference. Positions without a label stay. The class is the target label, so
      mu_c carries the label to a model that learns to read it, and the accuracy under the clamp can exceed what the
      inputs allow. With `classes: batch` there is one mean, which says next to nothing about a label.
    - `random_direction`: x + |x r*/|x| - x| u, u uniform on the sphere: a control for the size of the displacement.
    - `zero`: 0.
    - `mean`: at each position, the mean over the batch.
    - `shuffle`: the activation of another row of the batch, so that every input gets that of another input.
    - `identity`: the same tensor, bit for bit: a control for the machinery.

    Where the module returns a tuple, its first element is clamped. All modes but `mean_preserving` ignore the labels
    and act on every forward of their stages, generation included. `mean_preserving` acts only in the steps of fit,
    validate and test, because a generation has no labels and its batches have other statistics. Under DDP mu_c and s
    are those of each rank's batch. Each member of an ensemble is clamped by itself, to the value of its member if the
    reference comes from an ensemble.

    Example::

        trainer:
          callbacks+:
            - class_path: ActivationClamp
              init_args: {site: final_residual, mode: naive, reference: runs/control/reference.safetensors}

    Args:
        site: Name pattern of the modules, see `lightning_modules.core.sites`.
        mode: The replacement.
        reference: The file that `ActivationReference` wrote in the control run, with r* and s* of this site.
        during: The stages in which the clamp acts: `fit`, `validate`, `test`, `predict`. Validation during fit is
            `validate`. By default all.
        classes: `target`: as above. `batch`: one factor for all positions. Then `naive` is x r*/m with m the mean of
            |x| over the batch, and `mean_preserving` takes all labelled positions as one class, or all positions if
            the batch has no labels for this site.
        labels: Key of the target labels in the batch, one label per position of x.
        seed: Seed of the random directions. They also depend on the step and the rank, and are the same in a resumed
            run.

    Raises:
        UserError: The mode lacks its reference, `during` is empty, or the seed is negative; at `setup`, the site
            matches nothing, or the reference does not exist or lacks the site; in a step, classes are needed and the
            batch has no labels of that shape.
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
        self._targets: list[Tensor] = []  # r* or s* of each module, if there is a reference
        self._labels: Tensor | None = None
        self._training_in_step: bool | None = None

    @property
    def state_key(self) -> str:
        """Return a key that differs between two clamps of one trainer."""
        return self._generate_state_key(site=self.site, mode=self.mode, during=self.during)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the reference, and add hooks to the modules that match the site."""
        modules = match_modules(pl_module, self.site, "ActivationClamp.site")
        if self.reference is not None:
            key = f"spread.{self.classes}" if self.mode == "mean_preserving" else "radius"
            self._targets = read_reference(
                self.reference, [f"{name}.{key}" for name in modules], ensemble_size(pl_module)
            )
        for index, module in enumerate(modules.values()):
            self._handles.append(module.register_forward_hook(self._hook(trainer, pl_module, index)))

    def _hook(
        self, trainer: Trainer, pl_module: LightningModule, index: int
    ) -> Callable[[nn.Module, object, object], object]:
        def hook(module: nn.Module, args: object, output: object) -> object:
            if self.mode == "identity" or not self._acts(trainer):
                return output
            if self.mode == "mean_preserving" and pl_module.training is not self._training_in_step:
                return output
            return replace_first(output, self.site, lambda x: self._clamp(x, index))

        return eager(hook, lambda: not self._acts(trainer))

    def _clamp(self, x: Tensor, index: int) -> Tensor:
        match self.mode:
            case "zero":
                return torch.zeros_like(x)
            case "mean" | "shuffle" if len(x) == 1:
                rank_zero_warn(f"ActivationClamp(mode={self.mode!r}) changes nothing in a batch of one row.")
                return x
            case "mean":
                return x.mean(0, keepdim=True).expand_as(x)
            case "shuffle":
                return x.roll(1, 0)
            case "naive" if self.classes == "batch":
                return clamp_mean_radius(x, self._target(index, x.device))
            case "naive":
                return clamp_radius(x, self._target(index, x.device))
            case "mean_preserving":
                return clamp_spread(x, self._classes_of(x), self._target(index, x.device))
            case "random_direction":
                direction = torch.randn(x.shape, generator=self._generator(x, index), device=x.device)
                displacement = clamp_radius(x, self._target(index, x.device)) - x
                length: Tensor = displacement.norm(dim=-1, keepdim=True)
                return x + length * nn.functional.normalize(direction, dim=-1)
            case "identity":
                return x

    def _target(self, index: int, device: torch.device) -> Tensor:
        target = self._targets[index]
        if target.dim() == 0:
            return target
        if target.device != device:
            target = self._targets[index] = target.to(device)  # once, because a step would wait for the copy
        call = member_call()
        assert call is not None  # `read_reference` takes values of members for an ensemble alone
        return target[call.index]

    def _classes_of(self, x: Tensor) -> Tensor:
        call = member_call()
        labels = fitting_labels(call.labels if call else self._labels, x)
        if self.classes == "batch":
            return x.new_zeros(x.shape[:-1], dtype=torch.long) if labels is None else labels.clamp(max=0)
        if labels is None:
            raise UserError(
                f"ActivationClamp at {self.site!r} needs the class of every position, but the batch has no "
                f"{self.labels!r} of shape {tuple(x.shape[:-1])}."
            )
        return labels

    def on_stage_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the step, the labels, and the mode of the module."""
        super().on_stage_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if not trainer.predicting:
            self._labels = labels_of(batch, self.labels)
            # Generation inside a training step switches to eval mode, and its forwards are not clamped by class.
            self._training_in_step = pl_module.training

    def on_stage_batch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the labels."""
        self._labels = None
        self._training_in_step = None
