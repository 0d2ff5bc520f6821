"""Training of an ordinary causal language model on questions and answers.

Shapes: B batch, T positions, N all positions of the batch, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.batch import IGNORE, TokenBatch
from datamodules.errors import UserError, check_numbers
from datamodules.problems import Problem
from lightning_modules.core.answer_file import WritesAnswers
from lightning_modules.core.contracts import OnNonfinite, Workload, connected
from lightning_modules.core.files import replacing_files
from lightning_modules.core.metrics import Proportion
from lightning_modules.core.precision import check_precision
from lightning_modules.core.reporting import is_dry_run, log_losses, record_proportion
from lightning_modules.core.samples import EvalSample
from lightning_modules.core.schedule import with_schedule
from lightning_modules.core.token_weight import weigh_labels
from lightning_modules.pretrained.from_pretrained import quiet
from lightning_modules.pretrained.generation import end_tokens, filler_token, generate
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.prompts import LONGEST, Prompt, added_tokens, encode, with_added
from lightning_modules.question_answering.collation import Collation, EvaluationBatch
from lightning_modules.question_answering.limits import Limits
from lightning_modules.question_answering.start_model import start_model
from lightning_modules.question_answering.tokenizer import ByteLevelBPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURES = ("accuracy", "blind_accuracy")


class QuestionAnswering(WritesAnswers):
    """A causal language model that reads a question and writes its answer.

    A share of the training problems asks the model to repeat the question instead, so that it learns to copy names and
    numbers exactly. The loss is next-token cross-entropy in nats, on all positions or on the answer alone. Test sets
    give `<set>/accuracy` of generated answers, and `<set>/blind_accuracy`, which is the accuracy of the one answer that
    the model gives to a prompt without a question. `predict` writes the answers to `samples/predictions.jsonl`.

    Args:
        pretrained: The model to fine-tune, with its tokenizer. Alternative to `config`.
        config: Fields of the configuration of a new model, `model_type` among them.
        tokenizer: With `config`: the settings of a tokenizer to train on the data, or a folder with a tokenizer.
        optimizer: The optimizer, without its parameters.
        warmup_steps: Steps in which the learning rate rises; it then falls to zero along a cosine.
        prompt: The text around the question.
        repeat_prompt: The text around a question that the model should repeat.
        repeat_fraction: Share of training problems that use `repeat_prompt`.
        answer_only: Leave the prompt out of the loss (usual when fine-tuning a large model).
        max_new_tokens: Length limit of generated answers, in tokens.
        save_to: Folder for model and tokenizer after `fit`, in the format of `save_pretrained`.
        on_nonfinite: Whether a run ends when the loss or a weight is not finite.

    Raises:
        UserError: Settings are out of range, contradict each other or miss one that another needs.
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
        on_nonfinite: OnNonfinite = "stop",
    ):
        super().__init__()
        check_numbers("model", 0, 1, repeat_fraction=repeat_fraction)
        check_numbers("model", 0, warmup_steps=warmup_steps)
        check_numbers("model", 1, LONGEST, max_new_tokens=max_new_tokens)
        self.optimizer, self.warmup_steps, self.save_to = optimizer, warmup_steps, save_to
        self.on_nonfinite = on_nonfinite
        self.prompt, self.max_new_tokens = Prompt(prompt), max_new_tokens
        self.collation = Collation(
            self.prompt, Prompt(repeat_prompt, "model.repeat_prompt"), repeat_fraction, answer_only
        )
        self.bpe = tokenizer if isinstance(tokenizer, ByteLevelBPE) else None
        self.model, self._tokenizer = start_model(pretrained, config, tokenizer)
        self.static_cache = pretrained is not None and pretrained.static_cache
        self.limits = Limits.of(self.model, pretrained.path if pretrained else None)
        self.validation_loss = MeanMetric()  # over the labelled tokens of all ranks
        self.proportions: dict[str, Proportion] = {}
        self.blind_output, self.diverged = "", False  # of the current test
        self.intervals: dict[str, tuple[float, float]] = {}
        self.counts: dict[str, int] = {}
        self.hits: dict[str, list[int]] = {}

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer; a new one exists after `setup`."""
        if self._tokenizer is None:
            raise RuntimeError("the tokenizer is trained in setup, which has not run yet")
        return self._tokenizer

    def setup(self, stage: str) -> None:
        """Train the tokenizer if there is none yet. All ranks use the same texts and so get the same tokenizer.

        Raises:
            UserError: The data has no texts to train a tokenizer on, or a precision rounds updates away.
        """
        if stage == "fit":
            check_precision(self.trainer)
            self._check_dtype()
        if self._tokenizer is None and self.bpe is not None:
            self._tokenizer = self.bpe.train_on(connected(self.trainer).datamodule)

    def _check_dtype(self) -> None:
        kinds = {parameter.dtype for parameter in self.model.parameters()} & {torch.bfloat16, torch.float16}
        if kinds:
            owner, kind = "pretrained" if self.limits.path else "config", str(kinds.pop()).removeprefix("torch.")
            raise UserError(
                f"model.{owner}.dtype: {kind} rounds small updates away, use float32 with trainer.precision bf16-mixed"
            )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return logits_BTV."""
        return cast(Tensor, self.model(input_ids=tokens_BT).logits)

    def collate(self, problems: Sequence[Problem], training: bool) -> TokenBatch | EvaluationBatch:
        """Make a batch; a batch for evaluation also has the prompts.

        Raises:
            UserError: The model lacks a token of a text, or has too few positions for a row.
        """
        end, filler = end_tokens(self.model, self.tokenizer)[:1], filler_token(self.model, self.tokenizer)
        batch = self.collation.batch(problems, self.tokenizer, end, filler, training)
        self.limits.check(batch["tokens"].tolist())
        return batch

    def loss(self, batch: TokenBatch) -> Tensor:
        """Return the mean cross-entropy over the labelled positions, in nats."""
        logits_NV, labels_N = self(batch["tokens"]).flatten(0, 1), batch["labels"].flatten()
        return torch.nn.functional.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORE)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Log and return the loss; over all ranks it is a mean over their labelled tokens."""
        loss = weigh_labels(self, self.loss(batch), batch["labels"])
        log_losses(self, {"loss": loss})
        return loss

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Log the held-out loss, a mean over the labelled tokens of all batches and ranks."""
        count = int((batch["labels"] != IGNORE).sum())
        self.validation_loss.update(self.loss(batch), weight=count)
        self.log("validation/loss", self.validation_loss, batch_size=count)

    def on_test_epoch_start(self) -> None:
        """Generate the answer to a prompt without a question; only chance makes it right."""
        # New ones, for a test that failed leaves its own; all on every rank, since their sums are collectives
        names = [f"{name}/{measure}" for name in self.trainer.test_dataloaders or () for measure in MEASURES]
        self.proportions = {name: Proportion().to(self.device) for name in names}
        row = with_added(encode(self.tokenizer, [self.prompt.fill("")])[0], added_tokens(self.tokenizer)[0])
        self.blind_output = self._answers([row])[0]
        blind_BT = torch.tensor([row], device=self.device)
        self.diverged = not bool(self(blind_BT).isfinite().all())  # NaN logits would still give tokens

    def test_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score the generated answers and the blind answer."""
        name, problems = list(self.trainer.test_dataloaders or ())[dataloader_idx], batch["problems"]
        hits = {"accuracy": sum(sample.scores["accuracy"] for sample in self.sample_eval(batch))}
        hits["blind_accuracy"] = sum(problem.is_correct(self.blind_output) for problem in problems)
        for measure, number in hits.items():
            self.proportions[f"{name}/{measure}"].update(number, len(problems))

    def on_test_epoch_end(self) -> None:
        """Log each proportion and record its hits, samples and interval; a model that diverged has no accuracy."""
        for name, metric in self.proportions.items():
            share, _, _, count = metric.compute().tolist()
            if not count:
                continue
            self.log(name, torch.nan if self.diverged else share)
            self.counts[name] = int(count)
            if not self.diverged:
                record_proportion(self, name, torch.tensor([share * count]), int(count))
        self.proportions.clear()

    def _answers(self, prompts: list[list[int]]) -> list[str]:
        """Answer prompts, each a list of tokens.

        Raises:
            UserError: The model has too few positions for the longest prompt with its answer.
        """
        self.limits.check(prompts, self.max_new_tokens)
        answers = generate(
            self.model,
            self.tokenizer,
            prompts,
            self.max_new_tokens,
            self.prompt.stop,
            static_cache=self.static_cache,
        )
        return [answer.text for answer in answers]

    def sample_eval(self, batch: EvaluationBatch) -> list[EvalSample]:
        """Generate an answer to every problem of a batch and score it."""
        outputs = self._answers(batch["prompts"])
        return [
            EvalSample(p.question, p.answer, output, {"accuracy": float(p.is_correct(output))})
            for p, output in zip(batch["problems"], outputs, strict=True)
        ]

    def workload(self, batch: TokenBatch) -> Workload:
        """Return sequences, tokens and flops of a training step: 6 flops per parameter and token."""
        samples, tokens = batch["tokens"].shape[0], batch["tokens"].numel()
        return Workload(samples, tokens, 6 * tokens * self.model.num_parameters())

    def on_fit_end(self) -> None:
        """Write model and tokenizer to `save_to`."""
        if self.save_to and self.trainer.is_global_zero and not is_dry_run(self.trainer):
            quiet()
            with replacing_files(Path(self.save_to)) as draft:
                self.model.save_pretrained(str(draft))
                self.tokenizer.save_pretrained(str(draft))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its schedule."""
        return with_schedule(self, self.optimizer, self.warmup_steps)
