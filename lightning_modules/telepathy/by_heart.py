"""A few problems learned by heart: by the bridge, or by vectors that are optimised for each problem.

Shapes: B batch, K vectors, D target width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.core.schedule import warmup
from lightning_modules.telepathy.averages import row_mean
from lightning_modules.telepathy.batch import TrainingBatch
from lightning_modules.telepathy.contracts import Gated
from lightning_modules.telepathy.objectives import lm

PROMPT_RATE = 0.05  # learning rate of soft prompts, in units of the embeddings' scale
LOOK = 5  # steps between two looks at the loss

Vectors = Callable[[], tuple[Tensor, Tensor | float]]  # soft_BKD, and what is to be lowered beside the cross-entropy


def overfitted(module: Gated, batch: TrainingBatch, steps: int, low: float) -> float:
    """Train bridge and bottleneck on one batch with the module's optimizer; return the cross-entropy at the end.

    A codebook gets its gradient from the objective `commitment`, with its weight. The batch is that of this rank, and
    the cross-entropy the largest one of all ranks; training ends early once it is below `low`. The weights are put
    back.
    """
    with torch.no_grad(), module.trainer.precision_plugin.val_step_context():
        batch = TrainingBatch(**{**batch, "states": module.read(batch)})  # read once
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = module.optimizer(parameters)
    rises = min(module.warmup_steps, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup(step + 1, rises))

    def step() -> None:
        clip = module.trainer.gradient_clip_val
        if clip:
            nn.utils.clip_grad_norm_(parameters, float(clip))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    commitment = module.objectives.get("commitment")

    def encoded() -> tuple[Tensor, Tensor | float]:
        encoding = module.encode(batch)
        if encoding.codes is None or commitment is None:
            return encoding.soft_BKD, 0.0
        return encoding.soft_BKD, commitment.weight * row_mean(encoding.codes.commitment_BK, batch["soft_mask"])

    module.train()
    try:
        return _descend(module, batch, encoded, step, steps, low)
    finally:
        optimizer.zero_grad()
        module.load_state_dict(kept)
        module.eval()


def prompted(module: Gated, batch: TrainingBatch, steps: int, low: float) -> float:
    """Optimise vectors for each problem of a batch; return the cross-entropy at the end, see `overfitted`."""
    scale, mask_BK = module.target.scale(), batch["soft_mask"]
    generator = torch.Generator().manual_seed(0)
    start_BKD = torch.randn(*mask_BK.shape, module.target.width, generator=generator)
    unit_BKD = nn.Parameter(start_BKD.to(mask_BK.device))  # of size 1, to which rates of learning are fitted
    optimizer = torch.optim.Adam([unit_BKD], lr=PROMPT_RATE)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return _descend(module, batch, lambda: (scale * unit_BKD, 0.0), step, steps, low)


def _descend(
    module: Gated, batch: TrainingBatch, vectors: Vectors, step: Callable[[], None], steps: int, low: float
) -> float:
    """Lower the cross-entropy of the answers until it is below `low` on every rank, or for `steps` steps."""
    plugin, packing, loss = module.trainer.precision_plugin, batch["soft"], float("nan")
    for number in range(steps + 1):
        context: AbstractContextManager[Any] = plugin.train_step_context()
        with torch.enable_grad():
            with context:
                soft_BKD, beside = vectors()
                loss_now = lm(module.target.logits(packing, soft_BKD), packing.labels_N)
            if number % LOOK == 0 or number == steps:
                # Ranks decide together, since a sharded target needs all of them in every step
                loss = float(module.trainer.strategy.reduce(loss_now.detach().clone(), reduce_op="max"))
                if number == steps or not low < loss < float("inf"):
                    break
            (loss_now + beside).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        step()
    return loss
