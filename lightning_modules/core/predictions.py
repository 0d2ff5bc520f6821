"""Predictions for a person to read: files with logits and probabilities, and pictures of attention.

Shapes: S ensemble members, B inputs, T positions, V vocabulary, H heads.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from datamodules.batch import IGNORE, TokenBatch
from lightning_modules.core.reporting import add_figure, is_dry_run, run_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_modules.core.ensemble_module import EnsembleModule

TOP = 5  # most likely tokens listed for each position
MOST_LABELS = 24  # more tick labels than this cannot be read


def predict(
    module: "EnsembleModule", batch: TokenBatch, number: int, token_text: Callable[[int], str]
) -> dict[str, Tensor]:
    """Write logits, probabilities and attention of inputs to `predictions/` of the run; return logits and losses.

    Args:
        module: The model.
        batch: The inputs, [B, T].
        number: Number of the batch.
        token_text: Gives a token as text.
    """
    trainer, folder = module.trainer, run_folder(module.trainer) / "predictions"
    if trainer.world_size > 1:
        folder = folder / f"rank-{trainer.global_rank}"
    logits_SBTV, patterns = module.activations(batch["tokens"], pattern_sites(module.network))
    predictions = write_predictions(folder, number, batch, logits_SBTV, token_text)
    inputs = [row_T[:length] for row_T, length in zip(batch["tokens"], input_lengths(batch), strict=True)]
    name = f"attention-{number}"
    show_attention(trainer, f"predict/{name}", patterns, inputs, token_text, folder / name)
    return predictions


def draw_attention(module: "EnsembleModule", tokens_1T: Tensor, token_text: Callable[[int], str]) -> None:
    """Draw the attention of one test input, if the model has any."""
    if sites := pattern_sites(module.network):
        _, patterns = module.activations(tokens_1T, sites)
        show_attention(module.trainer, "test/attention", patterns, list(tokens_1T), token_text)


def write_predictions(
    folder: Path, number: int, batch: TokenBatch, logits_SBTV: Tensor, token_text: Callable[[int], str]
) -> dict[str, Tensor]:
    """Write the predictions of a batch and return its logits and losses.

    - `logits-<number>.safetensors`: `tokens`, `labels`, `logits` [S, B, T, V], `loss` [S, B, T] (NaN without a label),
      `lengths` [B]; positions from an input's length on are no part of it.
    - `positions-<number>.jsonl`: one line per input and position with its token, label, loss, and the most likely
      tokens with their probabilities, for the first ensemble member.

    Args:
        folder: The folder, made if it does not exist.
        number: Number of the batch.
        batch: Tokens and labels, [B, T].
        logits_SBTV: Logits.
        token_text: Gives a token as text.
    """
    from safetensors.torch import save_file

    tokens_BT, labels_BT = batch["tokens"], batch["labels"]
    logits_SBTV = logits_SBTV.float()
    log_p_SBTV = logits_SBTV.log_softmax(3)
    labelled_SBT = (labels_BT != IGNORE).expand(log_p_SBTV.shape[:3])
    label_SBT1 = labels_BT.clamp(min=0).expand(labelled_SBT.shape)[..., None]
    loss_SBT = torch.where(labelled_SBT, -log_p_SBTV.gather(3, label_SBT1)[..., 0], torch.nan)
    lengths = input_lengths(batch)
    tensors = {"tokens": tokens_BT, "labels": labels_BT, "logits": logits_SBTV, "loss": loss_SBT}
    tensors["lengths"] = torch.tensor(lengths)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, folder / f"logits-{number}.safetensors")
    lines = _lines(tokens_BT, labels_BT, lengths, loss_SBT[0], log_p_SBTV[0].exp(), token_text)
    (folder / f"positions-{number}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return {"logits": logits_SBTV, "loss": loss_SBT}


def input_lengths(batch: TokenBatch) -> list[int]:
    """Return the tokens of each input; all of a row, where the batch has no lengths."""
    rows, length = batch["tokens"].shape
    lengths: list[int] = batch["lengths"].tolist() if "lengths" in batch else rows * [length]
    return lengths


def _lines(
    tokens_BT: Tensor,
    labels_BT: Tensor,
    lengths: Sequence[int],
    loss_BT: Tensor,
    p_BTV: Tensor,
    token_text: Callable[[int], str],
) -> list[dict[str, Any]]:
    top = p_BTV.topk(min(TOP, p_BTV.shape[2]))
    lines: list[dict[str, Any]] = []
    for index, position in ((index, t) for index, length in enumerate(lengths) for t in range(length)):
        label = int(labels_BT[index, position])
        best = zip(top.indices[index, position].tolist(), top.values[index, position].tolist(), strict=True)
        line: dict[str, Any] = {"input": index, "position": position}
        line["token"] = token_text(int(tokens_BT[index, position]))
        if label != IGNORE:
            line |= {"label": token_text(label), "loss": round(loss_BT[index, position].item(), 5)}
        lines.append(line | {"likeliest": {token_text(token): round(p, 5) for token, p in best}})
    return lines


def pattern_sites(network: nn.Module) -> list[str]:
    """Return the names of the modules called `pattern`, whose outputs are attention weights."""
    return [f"network.{name}" for name, _ in network.named_modules() if name.rpartition(".")[2] == "pattern"]


def show_attention(
    trainer: Trainer,
    name: str,
    patterns: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    token_text: Callable[[int], str],
    path: Path | None = None,
) -> None:
    """Draw the attention of each input, for the first ensemble member, into loggers that take figures.

    Args:
        trainer: The trainer.
        name: Name of the picture, to which the number of the input is added if there are several.
        patterns: Site -> weights [S, B, H, T, T].
        inputs: The tokens of each input; positions behind them are left out.
        token_text: Gives a token as text.
        path: Also write `<path>-<input>.png`.
    """
    if not patterns or (path is None and not trainer.loggers) or is_dry_run(trainer):
        return
    for index, row_T in enumerate(inputs):
        length = len(row_T)
        first = {site: weights[0, index, :, :length, :length] for site, weights in patterns.items()}
        figure = attention_figure(first, [token_text(token) for token in row_T.tolist()])
        if path is not None:
            figure.savefig(f"{path}-{index}.png", dpi=110)
        add_figure(trainer, name if path is None else f"{name}-{index}", figure)


def attention_figure(patterns: Mapping[str, Tensor], tokens: list[str]) -> "Figure":
    """Draw the attention of one input: one row of pictures per block, one picture per head.

    Args:
        patterns: Site -> weights [H, T, T].
        tokens: The tokens of the input, as text.
    """
    from matplotlib.figure import Figure

    heads = len(next(iter(patterns.values())))
    figure = Figure(figsize=(2.4 * heads + 0.8, 2.6 * len(patterns) + 0.4), layout="constrained")
    grid = figure.subplots(len(patterns), heads, squeeze=False)
    labelled = len(tokens) <= MOST_LABELS
    for row, (name, pattern_HTT) in zip(grid, patterns.items(), strict=True):
        for head, (axes, pattern_TT) in enumerate(zip(row, pattern_HTT, strict=True)):
            image = axes.imshow(pattern_TT.float().cpu().numpy(), vmin=0, vmax=1, cmap="Blues")
            axes.set_title(f"{name.removeprefix('network.').removesuffix('.pattern')}\nhead {head}", fontsize=10)
            if labelled:
                axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=9)
                axes.set_yticks(range(len(tokens)), tokens, fontsize=9)
            else:
                axes.tick_params(labelsize=9)
    figure.colorbar(image, ax=grid, shrink=0.8, label="attention weight")
    figure.supxlabel("position read", fontsize=10)
    figure.supylabel("position that reads", fontsize=10)
    return figure
