"""Measures of how much outputs differ from input to input, which is not at all for a medium that carries nothing.

Shapes: B inputs, F features, R ranks, K positions, D width. Tensors are measured in at least fp32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_modules.core.spectrum import rank_of, singular_values


def cosine_matrix(x_BF: Tensor) -> Tensor:
    """Return cosine_BB, <x_i, x_j> / (|x_i| |x_j|); a zero vector has cosine 0 with every vector, itself included."""
    unit_BF = normalize(_at_least_fp32(x_BF), dim=-1)
    return unit_BF @ unit_BF.T


def mean_pairwise_cosine(x_BF: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the mean cosine over all pairs of different inputs.

    (|sum_i u_i|² - sum_i |u_i|²) / (B (B - 1)), u_i = x_i / |x_i|. It is 1 if all inputs give the same direction, about
    0 for independent directions, and at least -1 / (B - 1). An offset that all inputs share raises it, however much the
    inputs differ about that offset. NaN for a single input.

    Args:
        x_BF: Outputs by input.
        gather: Returns the rows of all ranks, for the mean over the inputs of all. Every rank has B of them. Sums over
            inputs are gathered, and not the outputs, so the traffic does not grow with B.
    """
    unit_BF = normalize(_at_least_fp32(x_BF), dim=-1)
    sum_RF, power_R = unit_BF.sum(0, keepdim=True), unit_BF.square().sum()[None]
    if gather is not None:
        sum_RF, power_R = gather(sum_RF), gather(power_R)
    count = len(x_BF) * len(sum_RF)
    return (sum_RF.sum(0).square().sum() - power_R.sum()) / (count * (count - 1))


def between_input_variance(x_BKD: Tensor, mask_BK: Tensor | None = None) -> Tensor:
    """Return the share of the power that depends on the input.

    The mean over k of E_i|x_ik - m_k|² / E_i|x_ik|², with m_k = E_i x_ik. It is 0 if every input gives the same output,
    even if positions differ; a variance over inputs and positions together would count that as diversity. It is 1 if
    the mean over inputs is zero at every position; B independent inputs about a zero mean give (B - 1) / B. It measures
    size, not content: noise that does not depend on the input counts as well, and a constant offset lowers it.

    Args:
        x_BKD: Outputs by input and position.
        mask_BK: True at real positions; means run over these. Positions of fewer than two inputs are left out, and the
            result is 0 if none is left.
    """
    x_BKD = _at_least_fp32(x_BKD)
    weight_BK = x_BKD.new_ones(x_BKD.shape[:2]) if mask_BK is None else mask_BK.to(x_BKD.dtype)
    x_BKD = x_BKD.where(weight_BK[..., None] > 0, 0.0)
    count_K = weight_BK.sum(0)
    mean_KD = x_BKD.sum(0) / count_K.clamp(min=1)[:, None]
    varying_K = ((x_BKD - mean_KD) * weight_BK[..., None]).square().sum(dim=(0, 2))
    power_K = x_BKD.square().sum(dim=(0, 2))
    share_K = varying_K / power_K.where(power_K > 0, 1.0)
    counted_K = count_K > 1
    return share_K.where(counted_K, 0.0).sum() / counted_K.sum().clamp(min=1)


def effective_rank(x_BF: Tensor) -> Tensor:
    """Return the number of directions along which inputs differ (Roy and Vetterli 2007).

    exp(-sum_i p_i ln p_i), p_i = s_i / sum_j s_j, with s_i the singular values of x less its mean over inputs. It lies
    between 1 and min(B - 1, F), so only values at the same B can be compared; it is 0 if all inputs give the same
    output, and NaN for values that are not finite. It has no scale: read it beside `between_input_variance`.
    """
    x_BF = _at_least_fp32(x_BF)
    values = singular_values(x_BF - x_BF.mean(0))
    # If all inputs give the same output, rounding in the mean leaves a remainder of some rank.
    least = 10 * torch.finfo(x_BF.dtype).eps * x_BF.norm()
    return rank_of(values.masked_fill(values <= least, 0.0))


def distinct(texts: Sequence[str]) -> float:
    """Return different texts / texts; NaN for no texts."""
    return len(set(texts)) / len(texts) if texts else float("nan")


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return different n-grams of words / n-grams, over all texts together (Li et al. 2016); NaN if there is none.

    It falls with the amount of text, so only values over about the same number of words can be compared.
    """
    words = [text.split() for text in texts]
    return distinct([" ".join(row[i : i + n]) for row in words for i in range(len(row) - n + 1)])


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
