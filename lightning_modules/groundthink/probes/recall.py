"""How many queries a model answers, by the place of the needle and by whether window attention could see it.

Shapes: S ensemble members, B rows, T positions, Q queries, V vocabulary, R values of a key, P parts of a row; an axis
of length 2 holds outside and inside of the window.
"""

import torch
from torch import Tensor, nn

from lightning_modules.core.metrics import strictly_above
from lightning_modules.groundthink.probes.needles import Queries
from lightning_modules.mixers.window_attention import WindowAttention


def window_reach(network: nn.Module) -> int | None:
    """Return how many positions back all layers of window attention together reach: sum(W - 1); None without any."""
    windows = [module.window for module in network.modules() if isinstance(module, WindowAttention)]
    return sum(window - 1 for window in windows) if windows else None


def hits(logits_SQV: Tensor, label_Q: Tensor) -> Tensor:
    """Return 1 where the label has the strictly largest logit, else 0, [S, Q]; NaN where a logit is NaN."""
    label_SQ1 = label_Q.expand(len(logits_SQV), -1)[..., None]
    own_SQ = logits_SQV.gather(2, label_SQ1)[..., 0]
    return strictly_above(own_SQ, logits_SQV.scatter(2, label_SQ1, -torch.inf).amax(2))  # amax keeps NaN


def found(logits_SQV: Tensor, answer_QR: Tensor) -> Tensor:
    """Return how many of the R answers are among the R most likely tokens, [S, Q]; NaN where a logit is NaN.

    An answer has to be strictly more likely than the token behind these R, so equal logits find nothing.

    The sum over all queries, divided by the number of answers, is `string_match_all` of RULER (Hsieh et al. 2024,
    arXiv:2404.06654): the share of the answers that the output contains. A model gives one distribution per query
    here, whose R most likely tokens stand for the output.
    """
    behind_SQ1 = logits_SQV.topk(answer_QR.shape[1] + 1, dim=2).values[..., -1:]
    count_SQ = (logits_SQV.gather(2, answer_QR.expand(len(logits_SQV), -1, -1)) > behind_SQ1).sum(2)
    return count_SQ.double().masked_fill(logits_SQV.isnan().any(2), torch.nan)


def tally(hit_SQ: Tensor, queries: Queries, length: int, parts: int, reach: int | None) -> tuple[Tensor, Tensor]:
    """Return the hits [S, P, 2] and the number of queries [P, 2] by the needle's part of the row and the window.

    Args:
        hit_SQ: Hits.
        queries: The queries.
        length: T.
        parts: P.
        reach: Reach of window attention; None counts all queries as outside.
    """
    inside_Q = torch.zeros_like(queries.time_Q) if reach is None else queries.within(reach).long()
    cell_Q = queries.depth(length, parts) * 2 + inside_Q
    hits_SC = hit_SQ.new_zeros(len(hit_SQ), parts * 2).index_add_(1, cell_Q, hit_SQ)
    return hits_SC.view(-1, parts, 2), torch.bincount(cell_Q, minlength=parts * 2).view(parts, 2)
