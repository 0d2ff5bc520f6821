"""Whether attention still changes whom it reads from.

Shapes: S members of an ensemble (1 for an ordinary module), B probe sequences, H heads, T positions.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from callbacks.quick_eval import eval_mode
from callbacks.throughput import off_the_clock
from datamodules.errors import UserError
from lightning_modules.core.reporting import refuse_second, report_members
from lightning_modules.core.sites import match_modules


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits: (KL(p | m) + KL(q | m)) / 2, m = (p + q) / 2, KL to base 2, 0 log 0 = 0.

    It is 0 where the distributions are equal and 1 where they are disjoint.

    Args:
        p: Distributions over the last axis, `[..., N]`; computed in at least fp32.
        q: Likewise.

    Returns:
        `[...]`.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    p, q = p.to(dtype), q.to(dtype)
    mean = (p + q) / 2
    mean = mean.where(mean > 0, 1.0)  # there p and q are 0, and so is what they add
    nats = (torch.xlogy(p, p / mean) + torch.xlogy(q, q / mean)).sum(-1) / 2
    return (nats / math.log(2)).clamp(min=0)


def routing_stability(now_SBHTT: Tensor, before_SBHTT: Tensor) -> Tensor:
    """G_S = 1 - the mean Jensen-Shannon divergence of queries' attention, over sequences, heads and queries.

    The first query can only attend to itself and is left out, unless it is the only one.
    """
    first = 1 if now_SBHTT.shape[-2] > 1 else 0
    # Member by member: the temporaries are several times as large as the attention.
    pairs = zip(now_SBHTT[..., first:, :], before_SBHTT[..., first:, :], strict=True)
    return torch.stack([1 - js_divergence(now, before).mean() for now, before in pairs])


class RoutingMonitor(Callback):
    """Logs how far attention has stayed the same since the last check, on a fixed batch.

    - `routing/g`: G = 1 - mean Jensen-Shannon divergence (base 2) between attention now and tau = `every_n_steps`
      optimizer steps ago, over sequences, heads, queries from the second on, and matching sites; 1 where nothing
      changed, 0 where every query reads from wholly other positions. One value for each member.

    The batch is the head of the first held-out batch, taken once; the module runs on it in eval mode, in the Trainer's
    precision, through its `activations(tokens, sites)`. Under DDP the ranks' G are averaged, in case their batches
    differ. Training takes the same course as without, and the time is left out of `Throughput`.

    Checks fall on multiples of `every_n_steps`, step 0 included, of which the first has nothing to compare with. The
    attention of the last check stays on the device, S B H T^2 numbers a site, and is not in checkpoints: a run resumed
    at such a multiple makes it again and loses nothing; one resumed elsewhere has no G at its first check.

    Args:
        site: Name pattern of the modules whose outputs are attention weights [B, H, T, T] with rows that sum to 1, see
            `lightning_modules.core.sites`.
        every_n_steps: tau, optimizer steps between checks.
        n_samples: B, at most a held-out batch.

    Raises:
        UserError: At `setup` for fit, if a number is not positive, the module cannot be looked into, or the site
            matches nothing; at the first check, if there is no held-out data, its batches have no `tokens`, or the site
            gives something else than attention weights.
    """

    def __init__(self, site: str = "*.attn.pattern", every_n_steps: int = 100, n_samples: int = 8) -> None:
        self.site = site
        self.every_n_steps = every_n_steps
        self.n_samples = n_samples
        self._tokens_BT: Tensor | None = None
        self._before: dict[str, Tensor] | None = None  # by site, of the last check
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what could only fail in mid-training."""
        if stage != "fit":
            return
        refuse_second(trainer, self)
        for name in ("every_n_steps", "n_samples"):
            if getattr(self, name) < 1:
                raise UserError(f"RoutingMonitor: `{name}` must be at least 1, got {getattr(self, name)}.")
        if not callable(getattr(pl_module, "activations", None)):
            raise UserError(
                f"RoutingMonitor needs `activations(tokens, sites)`, which {type(pl_module).__name__} does not have."
            )
        match_modules(pl_module, self.site)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the attention that the first check compares with, if a check falls here."""
        self._tokens_BT, self._before = None, None
        self._last_step = trainer.global_step
        if self._last_step % self.every_n_steps == 0:
            self._check(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compares where an interval ends."""
        step, last, self._last_step = trainer.global_step, self._last_step, trainer.global_step
        if step // self.every_n_steps > last // self.every_n_steps:
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Making a loader's iterator draws from the random state.
        with off_the_clock(trainer), isolate_rng(), torch.no_grad():
            if self._tokens_BT is None:
                self._tokens_BT = self._probe(trainer, pl_module).to(pl_module.device)
            with eval_mode(pl_module), trainer.precision_plugin.val_step_context():
                _, now = pl_module.activations(self._tokens_BT, [self.site])
            for name, attention in now.items():
                if attention.ndim != 5 or attention.shape[-1] != attention.shape[-2]:
                    shape = tuple(attention.shape)
                    raise UserError(f"RoutingMonitor: {name!r} gives no attention weights [S, B, H, T, T] but {shape}.")
            before, self._before = self._before, {name: attention.detach() for name, attention in now.items()}
            if before is None:
                return
            g_S = torch.stack([routing_stability(now[name], before[name]) for name in now]).mean(0)
            report_members(trainer, pl_module, {"routing/g": trainer.strategy.reduce(g_S, reduce_op="mean")})

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        owner = trainer.datamodule or pl_module
        loaders = owner.val_dataloader() if is_overridden("val_dataloader", owner) else trainer.val_dataloaders
        batch = None if loaders is None else next(iter(CombinedLoader(loaders, "sequential").flattened[0]), None)
        if batch is None:
            raise UserError("RoutingMonitor found no held-out data: it looks at the first validation batch.")
        if not isinstance(batch, Mapping) or "tokens" not in batch:
            raise UserError("RoutingMonitor needs validation batches that are dictionaries with `tokens`.")
        return batch["tokens"][..., : self.n_samples, :]  # [B, T], or [S, B, T] where members have data of their own

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the batch and of the attention."""
        self._tokens_BT, self._before = None, None
