"""The frozen target, driven by embeddings: soft tokens or text where the question stands.

Shapes: B batch, K body positions (soft tokens, or tokens of the question), D width, A positions after the body, L parts
side by side, T packed positions, N answer tokens of the whole batch, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from lightning_modules.pretrained.generation import generate
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.prompts import Prompt
from lightning_modules.telepathy.frozen import Frozen
from lightning_modules.telepathy.layout import Packing, cut, pack


@dataclass
class Frame:
    """The tokens around a body: `[head] body [after] answer`."""

    head: list[int]
    after: list[int]


class Target(Frozen):
    """A frozen causal language model that answers to a body of embeddings in its prompt.

    Args:
        pretrained: Which model.
        prompt: The text around the question.
        bos_behind: Give soft tokens the notes' frame, which is no prompt and the BOS behind them: to a model trained on
            packed documents, that says "a new text begins here, forget the last".

    Attributes:
        text_frame: What stands around the question's text.
        soft_frame: What stands around soft tokens; the same, unless `bos_behind`.
    """

    def __init__(self, pretrained: Pretrained, prompt: Prompt, bos_behind: bool = False):
        super().__init__(pretrained.load_causal_lm())
        self.tokenizer = pretrained.load_tokenizer()
        seams = cut(self.tokenizer, prompt, ["x"], ["x"])[0]
        bos = [self.tokenizer.bos_token_id]
        self.text_frame = Frame(bos + seams.before, seams.after)
        self.soft_frame = Frame([], bos) if bos_behind else self.text_frame

    @property
    def width(self) -> int:
        """D."""
        return self.embedding.weight.shape[1]

    @property
    def embedding(self) -> torch.nn.Embedding:
        """The input embedding."""
        return self.model.get_input_embeddings()

    def embed(self, tokens: list[int]) -> Tensor:
        """Return the embeddings_TD of a few tokens."""
        return self.embedding(torch.tensor(tokens, dtype=torch.long, device=self.embedding.weight.device))

    def logits(self, frame: Frame, body_BKD: Tensor, tail_BA: Tensor, packing: Packing) -> Tensor:
        """Return logits_NV at the answer's tokens alone; causal attention needs no mask, for padding comes last."""
        head_BHD = self.embed(frame.head).expand(len(body_BKD), -1, -1)
        parts_BLD = torch.cat([head_BHD, body_BKD.to(head_BHD.dtype), self.embedding(tail_BA)], dim=1)
        embeds_BTD = parts_BLD.gather(1, packing.order_BT[..., None].expand(-1, -1, self.width))
        hidden_BTD = self.model.base_model(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
        return self.model.get_output_embeddings()(hidden_BTD.flatten(0, 1)[packing.predict_N])

    @torch.no_grad()
    def answer_losses(
        self, frame: Frame, body_BKD: Tensor, mask_BK: Tensor, answers: list[list[int]]
    ) -> list[np.ndarray]:
        """Return the cross-entropy of each token of each answer."""
        planned = pack(len(frame.head), mask_BK.cpu(), frame.after, answers)
        tail_BA, packing = move_data_to_device(planned, body_BKD.device)
        logits_NV = self.logits(frame, body_BKD, tail_BA, packing)
        losses_N = torch.nn.functional.cross_entropy(logits_NV.float(), packing.labels_N, reduction="none")
        return np.split(losses_N.cpu().numpy(), np.cumsum([len(answer) for answer in answers])[:-1])

    @torch.no_grad()
    def answer(self, frame: Frame, body_BKD: Tensor, mask_BK: Tensor, max_new_tokens: int) -> list[str]:
        """Generate answers, greedily."""
        size = len(body_BKD)
        head_BHD, after_BAD = (self.embed(x).expand(size, -1, -1) for x in (frame.head, frame.after))
        embeds_BTD = torch.cat([head_BHD, body_BKD.to(head_BHD.dtype), after_BAD], dim=1)
        around = [mask_BK.new_ones(size, len(tokens)) for tokens in (frame.head, frame.after)]
        mask_BT = torch.cat([around[0], mask_BK, around[1]], dim=1)
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = generate(self.model, embeds_BTD, mask_BT, max_new_tokens, eos, pad)
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
