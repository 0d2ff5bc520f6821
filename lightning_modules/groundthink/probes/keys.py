"""How alike keys are: a write changes what a key reads in proportion to the cosine of the two keys.

Shapes: B rows, T positions, H heads, K key width.
"""

import math

import torch
from torch import Tensor


def mean_absolute_cosine(k_BTHK: Tensor, first_BT: Tensor, second_BT: Tensor) -> Tensor:
    """Return the mean of |<k_s, k_t>| by head, [H], over pairs of different positions of one row; NaN without a pair.

    All rows' pairs have one weight.

    Args:
        k_BTHK: Unit keys.
        first_BT: Positions of the first key of a pair.
        second_BT: Positions of the second key.
    """
    total_H, count = k_BTHK.new_zeros(k_BTHK.shape[2]), 0
    for k_THK, first_T, second_T in zip(k_BTHK, first_BT, second_BT, strict=True):  # the cosines of one row at a time
        both = int((first_T & second_T).sum())
        first_HFK, second_HSK = k_THK[first_T].transpose(0, 1), k_THK[second_T].transpose(0, 1)
        norms_H = k_THK[first_T & second_T].square().sum(2).sum(0)  # of each key with itself, which is no pair
        total_H = total_H + (first_HFK @ second_HSK.mT).abs().sum((1, 2)) - norms_H
        count += first_HFK.shape[1] * second_HSK.shape[1] - both
    return total_H / count if count else torch.full_like(total_H, torch.nan)


def random_cosine(width: int) -> float:
    """Return the mean |<a, b>| of random unit vectors, Gamma(K/2) / (sqrt(pi) Gamma((K+1)/2)): about sqrt(2/(pi K))."""
    return math.exp(math.lgamma(width / 2) - math.lgamma((width + 1) / 2)) / math.sqrt(math.pi)
