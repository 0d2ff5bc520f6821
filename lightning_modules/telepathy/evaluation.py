"""Validation, test and prediction with a bridge: what a trained bridge is asked, and nothing of its training.

Shapes: B batch, K soft tokens, D target width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torchmetrics import MeanMetric

from datamodules.errors import UserError, check_numbers
from datamodules.problems import Problem
from lightning_modules.core.answer_file import WritesAnswers
from lightning_modules.core.contracts import connected
from lightning_modules.core.samples import EvalSample
from lightning_modules.pretrained.prompts import LONGEST
from lightning_modules.pretrained.sharding import is_sharded
from lightning_modules.telepathy.answer_limit import longest_answer
from lightning_modules.telepathy.batch import EvaluationBatch, TelepathyBatch
from lightning_modules.telepathy.bottleneck import Bottleneck
from lightning_modules.telepathy.encoding import Encoding
from lightning_modules.telepathy.examination import Examination
from lightning_modules.telepathy.measures import scores
from lightning_modules.telepathy.target import Target
from lightning_modules.telepathy.text_prefix import TextPrefix


class BridgeEvaluation(WritesAnswers, ABC):
    """A module that returns soft tokens, as far as validation, test and prediction go.

    Args:
        max_new_tokens: Length limit of generated answers, in tokens; None for that of the data.

    Attributes:
        target: The frozen target; the subclass sets it.
        bottleneck: What makes codes of soft tokens; the subclass sets it.
        text_prefix: The learned prefix of the text baseline, if there is one; the subclass sets it.
        intervals: 95 % intervals of the measures, by their names in the log.
        counts: Their numbers of samples.
        hits: Of proportions, the numbers of hits.

    Raises:
        UserError: `max_new_tokens` is out of range.
    """

    target: Target
    bottleneck: Bottleneck
    text_prefix: TextPrefix | None

    def __init__(self, max_new_tokens: int | None):
        super().__init__()
        check_numbers("model", 1, LONGEST, max_new_tokens=max_new_tokens)
        self.max_new_tokens = max_new_tokens
        self._limit_of: tuple[object, int] | None = None  # the data and its limit
        self.validation_loss = MeanMetric()  # over the tokens of all ranks
        self.examinations: list[Examination] = []
        self.intervals: dict[str, tuple[float, float]] = {}
        self.counts: dict[str, int] = {}
        self.hits: dict[str, list[int]] = {}

    @abstractmethod
    def collate(self, problems: Sequence[Problem], training: bool) -> Mapping[str, Any]:
        """Make a batch of problems, for training with packed rows, for evaluation with the problems."""

    @abstractmethod
    def encode(self, batch: TelepathyBatch) -> Encoding:
        """Return the soft tokens of a batch, and what they came from."""

    @property
    def answer_limit(self) -> int:
        """Length limit of generated answers, in tokens.

        Raises:
            UserError: It is neither given nor known from the data.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        data: object = connected(self.trainer).datamodule
        if self._limit_of is None or self._limit_of[0] is not data:
            self._limit_of = data, longest_answer(self.target, data)
        return self._limit_of[1]

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Log the held-out cross-entropy of the answers, a mean over tokens."""
        encoding, mask_BK = self.encode(batch), batch["soft_mask"]
        losses_N = np.concatenate(self.target.losses(batch["soft_rows"], encoding.soft_BKD, mask_BK))
        self.validation_loss.update(losses_N.mean(), weight=len(losses_N))
        self.log("validation/loss", self.validation_loss, batch_size=len(losses_N))
        if encoding.codes is not None:
            self.bottleneck.use.update(encoding.codes.index_BK[mask_BK])
            self.log("validation/code_perplexity", self.bottleneck.use, batch_size=len(losses_N))

    def on_test_start(self) -> None:
        """Check the target.

        Raises:
            UserError: It is split over processes, which do unequal work in a test and would wait for one another.
        """
        if is_sharded(self.target.model):
            raise UserError("model.shard_frozen is for training: set test_after_fit to false, and test without it")
        self.target.check(trains=False)

    def on_predict_start(self) -> None:
        """Check the target."""
        self.target.check(trains=False)

    def on_test_epoch_start(self) -> None:
        """Start an examination of each test set."""
        self.examinations = [Examination(name) for name in self.trainer.test_dataloaders or ()]

    def test_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Examine a batch: answers and losses from soft tokens, from text, and from neither."""
        self.examinations[dataloader_idx].add(self, batch)

    def on_test_epoch_end(self) -> None:
        """Log every measure, with its interval, hits and samples."""
        for examination in self.examinations:
            examination.report(self)
        self.examinations = []

    def sample_eval(self, batch: EvaluationBatch) -> list[EvalSample]:
        """Answer a batch from soft tokens and score the answers."""
        answers = self.target.answers(batch["soft_rows"], self.answer_limit, self(batch), batch["soft_mask"])
        return [
            EvalSample(problem.question, problem.answer, answer.text, scores(problem, answer.text))
            for problem, answer in zip(batch["problems"], answers, strict=True)
        ]

    @torch.inference_mode()
    def answer(self, questions: Sequence[str], limit: int) -> list[str]:
        """Answer questions from soft tokens, with at most `limit` tokens each."""
        collated = self.collate([Problem(question, "") for question in questions], training=False)
        batch = cast(EvaluationBatch, move_data_to_device(collated, self.device))
        answers = self.target.answers(batch["soft_rows"], limit, self(batch), batch["soft_mask"])
        return [answer.text for answer in answers]
