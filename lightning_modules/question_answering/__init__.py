"""Training of causal language models on questions and answers: the embedded pair, and fine-tuning of hub models."""

from lightning_modules.question_answering.module import QuestionAnswering

__all__ = ["QuestionAnswering"]
