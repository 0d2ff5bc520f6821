"""Training of an ordinary causal language model on questions and answers.

Shapes: B batch, T positions, V vocabulary.
"""

from typing import Any
from zlib import crc32

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.core.contracts import Workload
from lightning_modules.core.metrics import Proportion
from lightning_modules.core.samples import EvalSample
from lightning_modules.core.schedule import with_schedule
from lightning_modules.pretrained.generation import generate
from lightning_modules.pretrained.loading import Pretrained, quiet
from lightning_modules.pretrained.prompts import Prompt, encode, pad
from lightning_modules.question_answering.tokenizer import ByteLevelBPE


class LanguageModel(LightningModule):
    """A causal language model that reads a question and writes its answer.

    A share of the training problems asks to repeat the question instead, so that the model learns to copy names and
    numbers exactly. The loss is next-token cross-entropy on all positions, or on the answer alone.

    Args:
        pretrained: A model to go on from, with its tokenizer.
        config: Or one to start: fields of its configuration, `model_type` first.
        tokenizer: With `config`: the tokenizer to train on the data's own texts, or a folder that holds one.
        optimizer: The optimizer, without its parameters.
        warmup_steps: Steps in which the learning rate rises; it then falls to zero along a cosine.
        prompt: The text around the question.
        repeat_prompt: The text that asks to repeat it.
        repeat_fraction: Share of training problems that do.
        answer_only: Leave the prompt out of the loss (usual when fine-tuning a large model).
        max_new_tokens: Longest answer generated in evaluation.
        save_to: Where to write model and tokenizer after `fit`, in `save_pretrained` form.
    """

    def __init__(
        self,
        pretrained: Pretrained | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: ByteLevelBPE | str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 100,
        prompt: str = "Question: {question}\nAnswer:",
        repeat_prompt: str = "Question: {question}\nRepeat:",
        repeat_fraction: float = 0.0,
        answer_only: bool = False,
        max_new_tokens: int = 100,
        save_to: str | None = None,
    ):
        super().__init__()
        if (pretrained is None) is (config is None):
            raise UserError("model needs either 'pretrained' or 'config', not both and not neither")
        if config is not None and tokenizer is None:
            raise UserError("model.config needs model.tokenizer: a folder, or the size of one to train")
        if config is not None and config.get("model_type") not in CONFIG_MAPPING:
            known = "one that transformers knows, such as llama or mistral"
            raise UserError(f"model.config.model_type must be {known}, not {config.get('model_type')!r}")
        if not 0 <= repeat_fraction <= 1:
            raise UserError(f"model.repeat_fraction must be between 0 and 1, not {repeat_fraction}")
        self.optimizer, self.warmup_steps, self.save_to = optimizer, warmup_steps, save_to
        self.prompt, self.repeat_prompt = Prompt(prompt), Prompt(repeat_prompt)
        self.repeat_fraction, self.answer_only, self.max_new_tokens = repeat_fraction, answer_only, max_new_tokens
        self.bpe = tokenizer if isinstance(tokenizer, ByteLevelBPE) else None
        if pretrained is not None:
            self.tokenizer, self.model = pretrained.load_tokenizer(), pretrained.load_causal_lm()
        else:
            self.tokenizer = None if self.bpe else Pretrained(tokenizer).load_tokenizer()
            names = ("pad_token_id", "bos_token_id", "eos_token_id")
            special = {name: getattr(self.tokenizer, name, index) for index, name in enumerate(names)}
            size = self.bpe.vocab_size if self.bpe else len(self.tokenizer)
            fields = special | {"vocab_size": size} | config
            self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), attn_implementation="sdpa")
        self.proportions = torch.nn.ModuleDict()
        self.intervals: dict[str, tuple[float, float]] = {}
        self.counts: dict[str, int] = {}

    def setup(self, stage: str) -> None:
        """Train the tokenizer where there is none yet; texts are the same on every rank, so the tokenizer is."""
        if self.tokenizer is None:
            self.tokenizer = self.bpe.train(self.trainer.datamodule.texts(self.bpe.texts))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return logits_BTV."""
        return self.model(input_ids=tokens_BT).logits

    def collate(self, problems: list, training: bool) -> dict[str, Any]:
        """Make a batch: tokens, labels, and for evaluation the problems and their prompts."""
        bos, eos = [self.tokenizer.bos_token_id], [self.tokenizer.eos_token_id]
        prompts, answers = [], []
        for problem in problems:
            # By hash, so that it is the same on every rank, in every worker and after a resume
            repeat = training and crc32(b"repeat" + problem.question.encode()) / 2**32 < self.repeat_fraction
            prompts.append((self.repeat_prompt if repeat else self.prompt).fill(problem.question))
            answers.append(f" {problem.question if repeat else problem.answer}")
        prompts, answers = encode(self.tokenizer, prompts), encode(self.tokenizer, answers)
        rows = [bos + prompt + answer + eos for prompt, answer in zip(prompts, answers, strict=True)]
        tokens_BT, mask_BT = pad(rows, self.tokenizer.pad_token_id)
        labels_BT = tokens_BT.masked_fill(~mask_BT, IGNORE)
        if self.answer_only:
            for row, prompt in zip(labels_BT, prompts, strict=True):
                row[: len(prompt) + 1] = IGNORE
        batch = {"tokens": tokens_BT, "labels": labels_BT}
        if not training:
            batch["prompt"], batch["prompt_mask"] = pad([bos + row for row in prompts], self.tokenizer.pad_token_id)
            batch["problems"] = problems
        return batch

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean next-token cross-entropy over the labelled positions."""
        logits_BTV = self(batch["tokens"])
        return torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Log and return the loss."""
        loss = self.loss(batch)
        self.log("train/loss", loss, batch_size=len(batch["tokens"]), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the held-out loss."""
        self.log("validation/loss", self.loss(batch), batch_size=len(batch["tokens"]), sync_dist=True, prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Answer without any question, once: what only chance gets right."""
        row = [self.tokenizer.bos_token_id, *encode(self.tokenizer, [self.prompt.fill("")])[0]]
        blind_BT = torch.tensor([row], device=self.device)
        self.blind_output = self._answers(blind_BT, torch.ones_like(blind_BT, dtype=torch.bool))[0]

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score the generated answers, and the one given blindly."""
        name = list(self.trainer.test_dataloaders)[dataloader_idx]
        accuracy, blind_accuracy = self._proportion(f"{name}/accuracy"), self._proportion(f"{name}/blind_accuracy")
        for sample, problem in zip(self.sample_eval(batch), batch["problems"], strict=True):
            accuracy.update(sample.scores["accuracy"])
            blind_accuracy.update(problem.is_correct(self.blind_output))

    def on_test_epoch_end(self) -> None:
        """Log each proportion with its interval."""
        for name, metric in self.proportions.items():
            share, low, high, count = metric.compute().tolist()
            self.log(name, share)
            self.intervals[name], self.counts[name] = (low, high), int(count)
        self.proportions.clear()

    def _proportion(self, name: str) -> Proportion:
        if name not in self.proportions:
            self.proportions[name] = Proportion().to(self.device)
        return self.proportions[name]

    def _answers(self, tokens_BT: Tensor, mask_BT: Tensor) -> list[str]:
        embeds_BTD = self.model.get_input_embeddings()(tokens_BT)
        eos, pad_id = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = generate(self.model, embeds_BTD, mask_BT, self.max_new_tokens, eos, pad_id)
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def sample_eval(self, batch: dict[str, Any]) -> list[EvalSample]:
        """Generate an answer to every problem of a batch and score it."""
        outputs = self._answers(batch["prompt"], batch["prompt_mask"])
        return [
            EvalSample(p.question, p.answer, output.strip(), {"accuracy": float(p.is_correct(output))})
            for p, output in zip(batch["problems"], outputs, strict=True)
        ]

    def workload(self, batch: dict[str, Any]) -> Workload:
        """Samples, tokens and flops of a training step: 6 a parameter and token."""
        samples, tokens = batch["tokens"].shape[0], batch["tokens"].numel()
        return Workload(samples, tokens, 6 * tokens * self.model.num_parameters())

    def on_fit_end(self) -> None:
        """Write model and tokenizer where the user asked."""
        if self.save_to and self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            quiet()
            self.model.save_pretrained(self.save_to)
            self.tokenizer.save_pretrained(self.save_to)

    def configure_optimizers(self) -> dict[str, Any]:
        """Make the optimizer and its schedule."""
        return with_schedule(self, self.optimizer, self.warmup_steps)
