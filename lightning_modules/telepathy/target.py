"""The frozen target, which reads embeddings: soft tokens or text in the place of the question.

Shapes: B batch, K body positions (soft tokens, or tokens of the question), D width, H positions before the body, A
positions after it, L = H + K + A, T packed positions, N answer tokens of the whole batch, V vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.pretrained.generation import generate
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.prompts import Prompt
from lightning_modules.telepathy.frozen import Frozen
from lightning_modules.telepathy.layout import Packing, cut, pack

if TYPE_CHECKING:
    from lightning_modules.pretrained.loading import CausalLM


@dataclass
class Frame:
    """The tokens around a body: `head body after answer`."""

    head: list[int]
    after: list[int]


class Target(Frozen):
    """A frozen causal language model that answers a body of embeddings in its prompt.

    Args:
        pretrained: The model to load.
        prompt: The text around the question.
        bos_behind: Use the notes' frame for soft tokens: no prompt, and the BOS behind the soft tokens. To a model that
            was trained on packed documents, this says that a new text begins and the last one is over.

    Attributes:
        model: The model.
        text_frame: The tokens around the text of the question.
        soft_frame: The tokens around the soft tokens; equal to `text_frame` unless `bos_behind`.
    """

    model: "CausalLM"

    def __init__(self, pretrained: Pretrained, prompt: Prompt, bos_behind: bool = False):
        super().__init__(pretrained.load_causal_lm())
        self.tokenizer = pretrained.load_tokenizer()
        seams = cut(self.tokenizer, prompt, ["x"], ["x"])[0]
        bos: list[int] = [self.tokenizer.bos_token_id]
        self.text_frame = Frame(bos + seams.before, seams.after)
        self.soft_frame = Frame([], bos) if bos_behind else self.text_frame

    @property
    def width(self) -> int:
        """Width D of the embeddings."""
        return self.embedding.weight.shape[1]

    @property
    def embedding(self) -> torch.nn.Embedding:
        """The input embedding."""
        return self.model.get_input_embeddings()

    def embed(self, tokens: list[int]) -> Tensor:
        """Return the embeddings_TD of a list of tokens."""
        tokens_T = torch.tensor(tokens, dtype=torch.long, device=self.embedding.weight.device)
        embeds_TD: Tensor = self.embedding(tokens_T)
        return embeds_TD

    def logits(self, frame: Frame, body_BKD: Tensor, tail_BA: Tensor, packing: Packing) -> Tensor:
        """Return logits_NV at the answer tokens alone.

        Padding comes last in a packed row, so causal attention needs no mask.
        """
        head_BHD = self.embed(frame.head).expand(len(body_BKD), -1, -1)
        parts_BLD = torch.cat([head_BHD, body_BKD.to(head_BHD.dtype), self.embedding(tail_BA)], dim=1)
        embeds_BTD = parts_BLD.gather(1, packing.order_BT[..., None].expand(-1, -1, self.width))
        hidden_BTD = self.model.base_model(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
        logits_NV: Tensor = self.model.get_output_embeddings()(hidden_BTD.flatten(0, 1)[packing.predict_N])
        return logits_NV

    @torch.no_grad()
    def answer_losses(
        self, frame: Frame, body_BKD: Tensor, mask_BK: Tensor, answers: list[list[int]]
    ) -> list[NDArray[np.float32]]:
        """Return for each answer the cross-entropy of its tokens, in nats."""
        planned = pack(len(frame.head), mask_BK.cpu(), frame.after, answers)
        tail_BA, packing = move_data_to_device(planned, body_BKD.device)
        logits_NV = self.logits(frame, body_BKD, tail_BA, packing)
        losses_N = torch.nn.functional.cross_entropy(logits_NV.float(), packing.labels_N, reduction="none")
        return np.split(losses_N.cpu().numpy(), np.cumsum([len(answer) for answer in answers])[:-1])

    @torch.no_grad()
    def answer(self, frame: Frame, body_BKD: Tensor, mask_BK: Tensor, max_new_tokens: int) -> list[str]:
        """Generate one answer per row, greedily."""
        size = len(body_BKD)
        head_BHD, after_BAD = (self.embed(tokens).expand(size, -1, -1) for tokens in (frame.head, frame.after))
        embeds_BTD = torch.cat([head_BHD, body_BKD.to(head_BHD.dtype), after_BAD], dim=1)
        around = [mask_BK.new_ones(size, len(tokens)) for tokens in (frame.head, frame.after)]
        mask_BT = torch.cat([around[0], mask_BK, around[1]], dim=1)
        eos, filler = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = generate(self.model, embeds_BTD, mask_BT, max_new_tokens, eos, filler)
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]
