"""Soft tokens in the target's embedding space: where they lie among its words, and which words are nearest.

Shapes: K soft tokens of a question, N vectors, V vocabulary, D target width.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.pretrained.causal_lm import CHUNK, vocabulary
from lightning_modules.telepathy.batch import EvaluationBatch
from lightning_modules.telepathy.target import Target

SHOWN = 2000  # embeddings in a picture


@dataclass(frozen=True)
class PlacedQuestion:
    """The soft tokens of a question in the embedding space.

    Attributes:
        question: The question.
        points: Where each soft token lies along the first two principal components of the embeddings.
        words: The token whose embedding has the largest cosine with each soft token, as text.
        cosines: These cosines.
        sizes: Root mean square of each soft token over that of the embeddings.
        in_question: Whether each of these tokens is one of the question's.
    """

    question: str
    points: list[list[float]]
    words: list[str]
    cosines: list[float]
    sizes: list[float]
    in_question: list[bool]


class EmbeddingSpace:
    """The embeddings of a target: their principal components, and their directions.

    Args:
        target: The target. Its vectors are embeddings.
    """

    @torch.no_grad()
    def __init__(self, target: Target):
        self.target, device = target, target.embedding.weight.device
        tokens = torch.arange(vocabulary(target.model), device=device)
        vectors_VD = torch.cat([target.embedding(part).float() for part in tokens.split(CHUNK)])  # type: ignore[no-untyped-call]
        self.scale = target.scale()
        self.mean_D = vectors_VD.mean(0)
        centred_VD = vectors_VD - self.mean_D
        _, axes_DD = torch.linalg.eigh(centred_VD.T @ centred_VD)  # the largest ones last
        self.axes_D2 = axes_DD[:, [-1, -2]]
        self.unit_VD = torch.nn.functional.normalize(vectors_VD, dim=-1)
        self.points_V2 = self.place(vectors_VD)

    def place(self, vectors_ND: Tensor) -> Tensor:
        """Return vectors along the first two principal components of the embeddings, points_N2."""
        points_N2: Tensor = (vectors_ND.float() - self.mean_D) @ self.axes_D2
        return points_N2

    def nearest(self, vectors_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each vector the token whose embedding has the largest cosine with it, and the cosine."""
        cosine_NV = torch.nn.functional.normalize(vectors_ND.float(), dim=-1) @ self.unit_VD.T
        cosine_N, token_N = cosine_NV.max(-1)
        return token_N, cosine_N

    def shown(self) -> list[list[float]]:
        """Return the places of at most 2000 embeddings, evenly spread over the vocabulary."""
        step = -(-len(self.points_V2) // SHOWN)
        points: list[list[float]] = self.points_V2[::step].tolist()
        return points


@torch.no_grad()
def placed(space: EmbeddingSpace, batch: EvaluationBatch, soft_BKD: Tensor) -> list[PlacedQuestion]:
    """Return where the soft tokens of a batch lie."""
    target, questions = space.target, [problem.question for problem in batch["problems"]]
    found = []
    for question, own, soft_KD, mask_K in zip(
        questions, target.rows.question_tokens(questions), soft_BKD, batch["soft_mask"], strict=True
    ):
        vectors_KD = soft_KD[mask_K].float()
        token_K, cosine_K = space.nearest(vectors_KD)
        sizes_K = vectors_KD.square().mean(-1).sqrt() / space.scale
        tokens = token_K.tolist()
        words = [str(target.tokenizer.decode([token])) for token in tokens]
        points, cosines, sizes = space.place(vectors_KD).tolist(), cosine_K.tolist(), sizes_K.tolist()
        found.append(PlacedQuestion(question, points, words, cosines, sizes, [token in own for token in tokens]))
    return found


def measures(questions: Sequence[PlacedQuestion]) -> dict[str, float]:
    """Return means over all soft tokens.

    - `nearest_cosine`: cosine with the nearest embedding.
    - `size`: root mean square, over that of the embeddings.
    - `in_question`: share of soft tokens whose nearest token is one of the question's.
    """
    every = {
        "nearest_cosine": [cosine for question in questions for cosine in question.cosines],
        "size": [size for question in questions for size in question.sizes],
        "in_question": [float(hit) for question in questions for hit in question.in_question],
    }
    return {name: sum(values) / len(values) for name, values in every.items()}


def snapshot(space: EmbeddingSpace, questions: Sequence[PlacedQuestion], step: int) -> dict[str, Any]:
    """Return what a picture of one step needs, as plain data."""
    return {"step": step, "embeddings": space.shown(), "questions": [asdict(question) for question in questions]}
