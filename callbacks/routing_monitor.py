"""Monitors how much attention patterns change between checks.

Shapes: S ensemble members (1 for an ordinary module), B probe sequences, H heads, T positions.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from callbacks.base import EveryNSteps, check_positive, refuse_second
from callbacks.held_out import evaluation, validation_loader
from callbacks.throughput import off_the_clock
from datamodules.errors import UserError
from lightning_modules.core.contracts import SupportsActivations
from lightning_modules.core.reporting import report_members
from lightning_modules.core.sites import match_modules


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence in bits: (KL(p | m) + KL(q | m)) / 2, with m = (p + q) / 2 (Lin 1991).

    KL is to base 2, and 0 log 0 = 0. The divergence is 0 where the distributions are equal, and 1 where they are
    disjoint.

    Args:
        p: Distributions over the last axis, `[..., N]`; computed in at least fp32.
        q: Distributions, likewise.

    Returns:
        The divergence, `[...]`.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    p, q = p.to(dtype), q.to(dtype)
    mean = (p + q) / 2
    mean = mean.where(mean > 0, 1.0)  # p and q are 0 there, and so are their terms
    nats = (torch.xlogy(p, p / mean) + torch.xlogy(q, q / mean)).sum(-1) / 2
    return (nats / math.log(2)).clamp(min=0)


def routing_stability(now_SBHTT: Tensor, before_SBHTT: Tensor) -> Tensor:
    """Return G_S = 1 - mean Jensen-Shannon divergence of a query's attention, over sequences, heads and queries.

    The first query can attend to itself only and is left out, unless it is the only query.
    """
    first = 1 if now_SBHTT.shape[-2] > 1 else 0
    # One member at a time, because the temporaries are several times as large as the attention.
    pairs = zip(now_SBHTT[..., first:, :], before_SBHTT[..., first:, :], strict=True)
    return torch.stack([1 - js_divergence(now, before).mean() for now, before in pairs])


class RoutingMonitor(Callback):
    """Logs how much attention patterns agree with those of the last check, on a fixed batch.

    - `routing/g`: G = 1 - mean Jensen-Shannon divergence (base 2) between attention now and tau = `every_n_steps`
      optimizer steps ago, over sequences, heads, queries from the second on, and matching sites. 1 means that nothing
      changed, 0 that every query reads from entirely different positions. One value per ensemble member.

    The batch is the head of the first held-out batch, taken once. The module runs on it in eval mode and in the
    Trainer's precision, through `activations(tokens, sites)`. Under DDP, G is the mean over ranks. The course of
    training is the same as without the monitor, and its time does not count in `Throughput`.

    Checks happen at multiples of `every_n_steps`, step 0 included. The first check has nothing to compare with. The
    attention of the last check stays on the device, S B H T^2 numbers per site, and is not in checkpoints. A run that
    resumes at a multiple computes it again and loses nothing. A run that resumes elsewhere has no G at its first check.

    Example::

        trainer:
          callbacks+:
            - {class_path: RoutingMonitor, init_args: {every_n_steps: 500}}

    Args:
        site: Name pattern of the modules whose outputs are attention weights [B, H, T, T] with rows that sum to 1, see
            `lightning_modules.core.sites`.
        every_n_steps: tau, optimizer steps between checks.
        n_samples: B, at most the size of a held-out batch.

    Raises:
        UserError: A number is not positive; at `setup` for fit, the module has no `activations`, the site matches
            nothing, or there are two of these callbacks; at the first check, there is no held-out data, its batches
            have no `tokens`, or the site returns something else than attention weights.
    """

    def __init__(self, site: str = "*.attn.pattern", every_n_steps: int = 100, n_samples: int = 8) -> None:
        check_positive(self, every_n_steps=every_n_steps, n_samples=n_samples)
        self.site = site
        self.every_n_steps = every_n_steps
        self.n_samples = n_samples
        self._checks = EveryNSteps(every_n_steps)
        self._tokens_BT: Tensor | None = None
        self._before: dict[str, Tensor] | None = None  # by site, at the last check

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse mistakes that would otherwise show in the middle of training."""
        if stage != "fit":
            return
        refuse_second(trainer, self)
        if not isinstance(pl_module, SupportsActivations):
            raise UserError(
                f"RoutingMonitor needs `activations(tokens, sites)`, which {type(pl_module).__name__} does not have."
            )
        match_modules(pl_module, self.site, "RoutingMonitor.site")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the attention that the first check compares with, if a check falls on this step."""
        self._tokens_BT, self._before = None, None
        self._checks.start(trainer.global_step)
        if trainer.global_step % self.every_n_steps == 0:
            self._check(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Compare at the end of an interval."""
        if self._checks.advance(trainer.global_step):
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with off_the_clock(trainer):
            now, before = self._attention(trainer, pl_module), self._before
            self._before = now
            if before is not None:
                g_S = torch.stack([routing_stability(now[name], before[name]) for name in now]).mean(0)
                mean_S = cast(Tensor, trainer.strategy.reduce(g_S, reduce_op="mean"))
                report_members(trainer, pl_module, {"routing/g": mean_S})

    def _attention(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        assert isinstance(pl_module, SupportsActivations)  # see `setup`
        with evaluation(trainer, pl_module):
            if self._tokens_BT is None:
                self._tokens_BT = self._probe(trainer, pl_module).to(pl_module.device)
            _, patterns = pl_module.activations(self._tokens_BT, [self.site])
        for name, pattern in patterns.items():
            if pattern.ndim != 5 or pattern.shape[-1] != pattern.shape[-2]:
                shape = tuple(pattern.shape)
                raise UserError(f"RoutingMonitor: {name!r} gives no attention weights [S, B, H, T, T] but {shape}.")
        return {name: pattern.detach() for name, pattern in patterns.items()}

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        batch = next(iter(validation_loader(trainer, pl_module, "RoutingMonitor")), None)
        if batch is None:
            raise UserError("RoutingMonitor found no held-out data: the first validation loader is empty.")
        if not isinstance(batch, Mapping) or not isinstance(tokens := batch.get("tokens"), Tensor):
            raise UserError("RoutingMonitor needs validation batches that are dictionaries with `tokens`.")
        return tokens[..., : self.n_samples, :]  # [B, T], or [S, B, T] where each member has its own data

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the batch and the attention."""
        self._tokens_BT, self._before = None, None
