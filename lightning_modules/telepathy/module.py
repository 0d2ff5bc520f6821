"""Telepathy: soft tokens from one frozen language model to another that shares no vocabulary with it.

Shapes: B batch, S source positions, C source width, K soft tokens, Q question tokens, D target width, T packed
positions, N answer tokens of the whole batch, V target vocabulary.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.errors import UserError
from lightning_modules.core.contracts import Workload
from lightning_modules.core.samples import EvalSample, gather_objects, write_jsonl
from lightning_modules.core.schedule import with_schedule
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.prompts import Prompt, pad
from lightning_modules.telepathy import objectives as objective
from lightning_modules.telepathy.bridges import BridgeFactory, OutputScale
from lightning_modules.telepathy.frozen import Frozen
from lightning_modules.telepathy.layout import cut, pack
from lightning_modules.telepathy.normalizer import StatisticalNormalizer
from lightning_modules.telepathy.objectives import Objective
from lightning_modules.telepathy.report import Examination
from lightning_modules.telepathy.target import Target

Flaw = Literal["key_scale", "bos_behind"]
NOTES_SCALE = 0.003  # root mean square that the notes recoloured source states to, that of Mistral 7B's embeddings


class Telepathy(LightningModule):
    """A frozen source reads the question, a bridge turns its hidden states to soft tokens, a frozen target answers.

    The target sees `<bos> before [soft tokens] after`, where `before {question} after` is its prompt: the soft tokens
    stand where the question's text would. Only the bridge is trained, and only the bridge is in checkpoints.

    Args:
        source: The model that reads. Only its layers up to `source_layer` are loaded.
        target: The model that answers.
        bridge: The bridge; its widths come from the models.
        source_layer: Whose output the bridge reads, from 1; a list is concatenated.
        normalizer: What source states pass before the bridge: `none`, `layer_norm`, or `statistical`, whitened by
            statistics of 256 held-out questions that are taken when `fit` starts.
        output: How soft tokens are brought to the scale of the target's embeddings (see `OutputScale`).
        objectives: Objective -> weight.
        optimizer: The optimizer, without its parameters.
        warmup_steps: Steps in which the learning rate rises; it then falls to zero along a cosine.
        prompt: The target's prompt; the source reads its part before the question.
        max_new_tokens: Longest answer generated.
        faithful: Keep the notes' flaws, all or some. `key_scale`: states recoloured to the scale of Mistral's
            embeddings (rms 0.003) before a cross-attention without LayerNorm or positions. `bos_behind`: no prompt, and
            the BOS between soft tokens and answer.
    """

    def __init__(
        self,
        source: Pretrained,
        target: Pretrained,
        bridge: BridgeFactory,
        source_layer: int | list[int],
        normalizer: Literal["none", "layer_norm", "statistical"] = "none",
        output: Literal["rms", "tanh", "none"] = "rms",
        objectives: dict[Objective, float] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 50,
        prompt: str = "Question: {question}\nAnswer:",
        max_new_tokens: int = 100,
        faithful: bool | list[Flaw] = False,
    ):
        super().__init__()
        self.layers = [source_layer] if isinstance(source_layer, int) else source_layer
        self.objectives = {"lm": 1.0} if objectives is None else objectives
        if not self.layers or min(self.layers) < 1:
            raise UserError(f"model.source_layer {source_layer} names no layer: they count from 1")
        for name in self.objectives:
            if name not in get_args(Objective):
                raise UserError(f"model.objectives has no '{name}': choose among {', '.join(get_args(Objective))}")
        if not any(self.objectives.values()):
            raise UserError("model.objectives is empty: give at least one objective a weight, such as {lm: 1.0}")
        self.optimizer, self.warmup_steps, self.max_new_tokens = optimizer, warmup_steps, max_new_tokens
        flaws = faithful if isinstance(faithful, list) else get_args(Flaw) if faithful else ()
        notes_scale = "key_scale" in flaws
        self.prompt = Prompt(prompt)
        self.source_tokenizer = source.load_tokenizer()
        self.source = Frozen(source.load_first_layers(max(self.layers)))
        self.target = Target(target, self.prompt, "bos_behind" in flaws)
        source_dim = self.source.model.config.hidden_size * len(self.layers)
        scale = self.target.embedding.weight.detach().float().square().mean().sqrt().item()
        match "statistical" if notes_scale else normalizer:
            case "statistical":
                self.normalizer = StatisticalNormalizer(source_dim, NOTES_SCALE if notes_scale else 1.0)
            case "layer_norm":
                self.normalizer = torch.nn.LayerNorm(source_dim, elementwise_affine=False)
            case "none":
                self.normalizer = torch.nn.Identity()
        self.bridge = bridge(source_dim, self.target.width, not notes_scale)
        self.soft_tokens = OutputScale(output, scale)
        self.strict_loading = False  # the frozen models are not in checkpoints
        self.validation_loss = MeanMetric()  # over tokens, whatever rank they are on
        self.examinations: dict[str, Examination] = {}
        self.predictions: list[EvalSample] = []
        self.intervals: dict[str, tuple[float, float]] = {}
        self.counts: dict[str, int] = {}

    def collate(self, problems: list, training: bool) -> dict[str, Any]:
        """Make a batch: source tokens, and for both ways into the target, soft tokens or text, how rows are packed."""
        questions, answers = [p.question for p in problems], [p.answer for p in problems]
        bos = [self.source_tokenizer.bos_token_id]
        source = cut(self.source_tokenizer, self.prompt, questions, [""] * len(problems))
        target = cut(self.target.tokenizer, self.prompt, questions, answers)
        wanted = [[*row.answer, self.target.tokenizer.eos_token_id] for row in target]
        _, source_mask_BS = pad([row.question for row in source], 0)
        soft_mask_BK = self.bridge.soft_mask(source_mask_BS)
        batch = {
            "source": pad([bos + row.before + row.question for row in source], 0)[0],
            "source_mask": source_mask_BS,
            "soft_mask": soft_mask_BK,
        }
        batch["text"], batch["text_mask"] = pad([row.question for row in target], 0)
        if not training:
            return batch | {"problems": problems, "answers": wanted}
        frame = self.target.soft_frame
        batch["soft_tail"], batch["soft_packing"] = pack(len(frame.head), soft_mask_BK, frame.after, wanted)
        if "kl_text" in self.objectives:
            frame = self.target.text_frame
            batch["text_tail"], batch["text_packing"] = pack(len(frame.head), batch["text_mask"], frame.after, wanted)
        return batch

    def read(self, batch: dict[str, Any]) -> Tensor:
        """Return the source's states_BSC at the question's positions; its prompt and BOS, an outlier, are left out."""
        with torch.no_grad():
            states = self.source(input_ids=batch["source"], output_hidden_states=True, use_cache=False).hidden_states
            states_BSC = torch.cat([states[layer] for layer in self.layers], dim=-1)
        return states_BSC[:, -batch["source_mask"].shape[1] :].float()

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return soft_BKD, the soft tokens of a batch, zero where a row has none."""
        states_BSC = self.normalizer(self.read(batch))
        return self.soft_tokens(self.bridge(states_BSC, batch["source_mask"]), batch["soft_mask"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Log each objective and return their weighted sum."""
        soft_BKD = self(batch)
        packing = batch["soft_packing"]
        logits_NV = self.target.logits(self.target.soft_frame, soft_BKD, batch["soft_tail"], packing)
        share = self._share(len(packing.labels_N))
        losses: dict[str, Tensor] = {}
        for name, weight in self.objectives.items():
            match name:
                case "lm":
                    losses[name] = weight * share * objective.lm(logits_NV, packing.labels_N)
                case "batch_diversity":
                    losses[name] = weight * objective.batch_diversity(self._gather(self._features(soft_BKD, batch)))
                case "contrastive":
                    soft_BD = _mean(soft_BKD, batch["soft_mask"])
                    text_BD = _mean(self.target.embedding(batch["text"]), batch["text_mask"])
                    losses[name] = weight * objective.contrastive(self._gather(soft_BD), self._gather(text_BD))
                case "kl_text":
                    with torch.no_grad():
                        body_BQD, frame = self.target.embedding(batch["text"]), self.target.text_frame
                        teacher_NV = self.target.logits(frame, body_BQD, batch["text_tail"], batch["text_packing"])
                    losses[name] = weight * share * objective.kl_text(logits_NV, teacher_NV)
        total = torch.stack(list(losses.values())).sum()
        size = len(batch["source"])
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=size)
        self.log("train/loss", total.detach(), batch_size=size, prog_bar=True)
        return total

    def _features(self, soft_BKD: Tensor, batch: dict[str, Any]) -> Tensor:
        """All soft tokens of an input in one row; their mean where the number differs, for ranks must agree on size."""
        fixed = getattr(self.bridge, "soft_tokens", None) is not None
        return soft_BKD.flatten(1) if fixed else _mean(soft_BKD, batch["soft_mask"])

    def _gather(self, x_BF: Tensor) -> Tensor:
        """Rows of all ranks, with gradient."""
        return self.all_gather(x_BF, sync_grads=True).flatten(0, 1) if self.trainer.world_size > 1 else x_BF

    def _share(self, count: int) -> Tensor | float:
        """This rank's answer tokens over the mean rank's; so weighted, the mean over ranks is one over all tokens."""
        if self.trainer.world_size == 1:
            return 1.0
        own = torch.tensor(float(count), device=self.device)
        return own / self.all_gather(own).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the held-out cross-entropy of the answers, by token."""
        losses = self.target.answer_losses(self.target.soft_frame, self(batch), batch["soft_mask"], batch["answers"])
        losses_N = np.concatenate(losses)
        self.validation_loss.update(losses_N.mean(), weight=len(losses_N))
        self.log("validation/loss", self.validation_loss, batch_size=len(losses_N), prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Begin an examination of each test set."""
        self.examinations = {name: Examination(name) for name in self.trainer.test_dataloaders}

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer by soft tokens and by text, and take the cross-entropies that tell what the soft tokens carry."""
        examination = self.examinations[list(self.trainer.test_dataloaders)[dataloader_idx]]
        examination.add(self, batch)

    def on_test_epoch_end(self) -> None:
        """Log every measure with its interval."""
        for examination in self.examinations.values():
            examination.report(self)
        self.examinations = {}

    def sample_eval(self, batch: dict[str, Any]) -> list[EvalSample]:
        """Answer a batch by soft tokens and score the answers."""
        frame, limit = self.target.soft_frame, self.max_new_tokens
        outputs = self.target.answer(frame, self(batch), batch["soft_mask"], limit)
        problems = batch["problems"]
        return [EvalSample(p.question, p.answer, o, _scores(p, o)) for p, o in zip(problems, outputs, strict=True)]

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[EvalSample]:
        """Answer a batch."""
        samples = self.sample_eval(batch)
        self.predictions += samples
        return samples

    def on_predict_epoch_end(self) -> None:
        """Write question, answer and output of all ranks to `samples/predictions.jsonl` in the run's folder."""
        samples = [sample for part in gather_objects(self.predictions) for sample in part]
        folder, self.predictions = self.trainer.log_dir, []
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run and folder is not None:
            write_jsonl(Path(folder, "samples", "predictions.jsonl"), samples)

    def on_fit_start(self) -> None:
        """Take the normalizer's statistics, where it has any; they are the same again after a resume."""
        if not isinstance(self.normalizer, StatisticalNormalizer):
            return
        states = []
        for batch in self.trainer.datamodule.sample_dataloader(256):
            batch = self.trainer.strategy.batch_to_device(batch)
            states.append(self.read(batch)[batch["source_mask"]])
        states_NC = torch.cat(states).double()
        sums = torch.stack([states_NC.sum(0), states_NC.square().sum(0), torch.full_like(states_NC[0], len(states_NC))])
        self.normalizer.calibrate(*self.all_gather(sums).reshape(-1, *sums.shape).sum(0))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another kind of bridge, which loading that is not strict would let pass."""
        given, own = checkpoint["state_dict"].keys(), self.state_dict().keys()
        for name in sorted(given ^ own):
            who = "does not have" if name in own else "has"
            raise UserError(
                f"the checkpoint {who} '{name}': it holds another kind of bridge, give its run's own config"
            )

    def workload(self, batch: dict[str, Any]) -> Workload:
        """Samples, target positions, and flops of a step.

        2 a parameter and position forward, as much again for gradients of activations, and of weights in the bridge.
        """
        sizes = [sum(p.numel() for p in module.parameters()) for module in (self.source, self.target, self.bridge)]
        tokens = batch["soft_packing"].order_BT.numel()
        source, target, bridge = 2 * batch["source"].numel(), 4 * tokens, 6 * batch["soft_mask"].numel()
        if "kl_text" in self.objectives:
            target += 2 * batch["text_packing"].order_BT.numel()
        return Workload(len(batch["source"]), tokens, source * sizes[0] + target * sizes[1] + bridge * sizes[2])

    def configure_optimizers(self) -> dict[str, Any]:
        """Make the optimizer and its schedule."""
        return with_schedule(self, self.optimizer, self.warmup_steps)


def _mean(x_BKD: Tensor, mask_BK: Tensor) -> Tensor:
    """Mean over the real positions."""
    weight_BK1 = mask_BK[..., None].to(x_BKD.dtype)
    return (x_BKD * weight_BK1).sum(1) / weight_BK1.sum(1).clamp_min(1)


def _scores(problem: Any, output: str) -> dict[str, float]:
    hits = {kind: found for kind, found in problem.entity_hits(output).items() if found}
    means = {f"entity_{kind}": sum(found) / len(found) for kind, found in hits.items()}
    return {"accuracy": float(problem.is_correct(output)), **means}
