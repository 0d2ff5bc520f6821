"""Trained parts of objectives, which read soft tokens. They serve training alone.

Shapes: B batch, S source positions, C source width, K soft tokens, D target width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PERIOD = 10_000.0  # the longest wave of positions, as in Vaswani et al. 2017


class Readout(nn.Module):
    """Predict the source's states from the soft tokens: a query for each position attends over all soft tokens.

    Args:
        target: D.
        source: C.
    """

    def __init__(self, target: int, source: int):
        super().__init__()
        self.query = nn.Linear(source, target)
        self.norm = nn.LayerNorm(target)
        self.place_KD: Tensor
        self.attention = nn.MultiheadAttention(target, 1, batch_first=True)
        self.out = nn.Linear(target, source)

    def forward(self, soft_BKD: Tensor, mask_BK: Tensor, positions: int) -> Tensor:
        """Return states_BSC."""
        query_SD = self.query(waves(positions, self.query.in_features, soft_BKD))
        value_BKD = self.norm(soft_BKD)
        # Keys know their own place, with the waves of the queries
        key_BKD = value_BKD + waves(soft_BKD.shape[1], value_BKD.shape[-1], soft_BKD)
        query_BSD = query_SD.expand(len(soft_BKD), -1, -1)
        read_BSD, _ = self.attention(query_BSD, key_BKD, value_BKD, key_padding_mask=~mask_BK, need_weights=False)
        states_BSC: Tensor = self.out(read_BSD)
        return states_BSC


def waves(positions: int, width: int, like: Tensor) -> Tensor:
    """Return sines and cosines of positions, place_SC (Vaswani et al. 2017)."""
    rate_C = PERIOD ** (-torch.arange(0, width, 2, device=like.device) / width)
    angle_SC = torch.arange(positions, device=like.device)[:, None] * rate_C
    return torch.cat([angle_SC.sin(), angle_SC.cos()], dim=1)[:, :width].to(like.dtype)


class WordHead(nn.Module):
    """Logits of words from the soft tokens as the target sees them: a max_k cos(soft token k, embedding v) + b.

    The embeddings are the target's, so the words have to be where the target can read them; a trained head could read
    them anywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor(8.0)), nn.Parameter(torch.tensor(-4.0))

    def forward(self, soft_BKD: Tensor, mask_BK: Tensor, words_VD: Tensor) -> Tensor:
        """Return logits_BV."""
        cosine_BKV = F.normalize(soft_BKD.float(), dim=-1) @ F.normalize(words_VD.float(), dim=-1).T
        return self.slope * cosine_BKV.masked_fill(~mask_BK[..., None], -1.0).amax(1) + self.offset
