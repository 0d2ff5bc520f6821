"""What a model says to given inputs, and where it looks: files and pictures for a person to read.

Shapes: S members, B inputs, T positions, V vocabulary, H heads.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor

from datamodules.batch import IGNORE

if TYPE_CHECKING:
    from lightning_modules.separability.module import Separability

TOP = 5  # tokens told for each position
PATTERN = "*.attn.pattern"


def write_predictions(module: "Separability", batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Write a batch's predictions into `predictions/` of the run's folder; return logits and losses.

    - `logits-<batch>.safetensors`: `tokens`, `labels`, `logits` [S, B, T, V], `loss` [S, B, T] (NaN without a label).
    - `positions-<batch>.jsonl`: by input and position, its token, the label, the loss, and the likeliest tokens with
      their probabilities; of an ensemble's first member.
    - `attention-<batch>-<input>.png`: every head of every block, of the first member; also to TensorBoard.
    """
    tokens_BT, labels_BT = batch["tokens"], batch["labels"]
    logits_SBTV, patterns = module.activations(tokens_BT, [PATTERN])
    logits_SBTV = logits_SBTV.float()
    log_p_SBTV = logits_SBTV.log_softmax(3)
    known_SBT = (labels_BT != IGNORE).expand(log_p_SBTV.shape[:3])
    label_SBT1 = labels_BT.clamp(min=0).expand(known_SBT.shape)[..., None]
    loss_SBT = torch.where(known_SBT, -log_p_SBTV.gather(3, label_SBT1)[..., 0], torch.nan)
    result = {"tokens": tokens_BT, "labels": labels_BT, "logits": logits_SBTV, "loss": loss_SBT}
    trainer = module.trainer
    folder = Path(trainer.log_dir or trainer.default_root_dir, "predictions")  # a collective: asked for on all ranks
    if trainer.world_size > 1:
        folder = folder / f"rank-{trainer.global_rank}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.cpu().contiguous() for key, value in result.items()}, folder / f"logits-{number}.safetensors")
    text = getattr(trainer.datamodule, "token_text", str)
    rows = _rows(tokens_BT, labels_BT, loss_SBT[0], log_p_SBTV[0].exp(), text)
    (folder / f"positions-{number}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for index, row_T in enumerate(tokens_BT.tolist()):
        figure = attention_figure({name: x[0, index] for name, x in patterns.items()}, [text(token) for token in row_T])
        figure.savefig(folder / f"attention-{number}-{index}.png", dpi=110)
        _show(module, f"predict/attention-{number}-{index}", figure)
    return {key: result[key] for key in ("logits", "loss")}


def show_attention(module: "Separability", tokens_BT: Tensor) -> None:
    """Draw one input's attention, of an ensemble's first member, into loggers that take figures."""
    if module.trainer.loggers and not module.trainer.fast_dev_run:
        _, patterns = module.activations(tokens_BT, [PATTERN])
        text = getattr(module.trainer.datamodule, "token_text", str)
        words = [text(token) for token in tokens_BT[0].tolist()]
        _show(module, "test/attention", attention_figure({name: x[0, 0] for name, x in patterns.items()}, words))


def _show(module: "Separability", name: str, figure: Figure) -> None:
    for logger in module.trainer.loggers:
        if add_figure := getattr(logger.experiment, "add_figure", None):
            add_figure(name, figure, module.trainer.global_step)


def _rows(tokens_BT: Tensor, labels_BT: Tensor, loss_BT: Tensor, p_BTV: Tensor, text) -> list[dict]:
    top_BTK = p_BTV.topk(min(TOP, p_BTV.shape[2]))
    rows = []
    for index, position in np.ndindex(tokens_BT.shape):
        label = labels_BT[index, position].item()
        best = zip(top_BTK.indices[index, position].tolist(), top_BTK.values[index, position].tolist(), strict=True)
        row = {"input": index, "position": position, "token": text(tokens_BT[index, position].item())}
        if label != IGNORE:
            row |= {"label": text(label), "loss": round(loss_BT[index, position].item(), 5)}
        rows.append(row | {"likeliest": {text(token): round(p, 5) for token, p in best}})
    return rows


def attention_figure(patterns: dict[str, Tensor], tokens: list[str]) -> Figure:
    """Attention of one input: a row of pictures for each block, one for each head.

    Args:
        patterns: Site -> weights [H, T, T].
        tokens: The input's tokens, as text.
    """
    heads = len(next(iter(patterns.values())))
    figure = Figure(figsize=(2.2 * heads + 0.6, 2.3 * len(patterns) + 0.3), layout="constrained")
    grid = figure.subplots(len(patterns), heads, squeeze=False)
    few = len(tokens) <= 24  # more labels than that cannot be read
    for row, (name, pattern_HTT) in zip(grid, patterns.items(), strict=True):
        for head, (axes, pattern_TT) in enumerate(zip(row, pattern_HTT, strict=True)):
            axes.imshow(pattern_TT.float().cpu().numpy(), vmin=0, vmax=1, cmap="Blues")
            axes.set_title(f"{name.removeprefix('network.').removesuffix('.attn.pattern')}, head {head}", fontsize=7)
            axes.set_xticks(range(len(tokens)) if few else [], tokens if few else [], rotation=90, fontsize=6)
            axes.set_yticks(range(len(tokens)) if few else [], tokens if few else [], fontsize=6)
    return figure
