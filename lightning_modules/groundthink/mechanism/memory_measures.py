"""What a memory still holds after some writes, and how exact the gradients of its chunked form are.

Shapes: S ensemble members, B rows, N items, K and V widths of keys and values, M measures.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics import Metric

from lightning_modules.core.metrics import strictly_above

MEANS = (
    "error",
    "first_error",
    "last_error",
    "similarity",
    "first_similarity",
    "last_similarity",
    "key_similarity",
    "state_norm",
    "soft_error",
)
SHARES = ("recall", "first_recall", "soft_recall")


class MemoryMeasures(Metric):
    """Measures of a memory after n writes, for several n, for each ensemble member; see `DeltaMemory`.

    Each row counts as one value of a mean, and each item as one sample of a share. Sums are in fp64 and over all ranks.

    Args:
        members: S.
        read_after: The numbers of writes, n.
    """

    full_state_update = False
    sum_: Tensor
    hits: Tensor
    rows: Tensor

    def __init__(self, members: int, read_after: Sequence[int]):
        super().__init__()
        self.read_after = list(read_after)
        for name, count in (("sum_", len(MEANS)), ("hits", len(SHARES))):
            zeros = torch.zeros(len(self.read_after), count, members, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reads: Sequence[tuple[Tensor, Tensor]], query_SBNK: Tensor, key_SBNK: Tensor, v: Tensor) -> None:
        """Add rows.

        Args:
            reads: For each n, the state_SBKV and what the queries read, read_SBNV.
            query_SBNK: Queries of the items.
            key_SBNK: Keys under which the items were written.
            v: Values of the items, [S, B, N, V].
        """
        for place, (count, (state_SBKV, read_SBNV)) in enumerate(zip(self.read_after, reads, strict=True)):
            items = query_SBNK[:, :, :count], key_SBNK[:, :, :count], v[:, :, :count]
            means, shares = measure(state_SBKV, read_SBNV, *items)
            self.sum_[place] += torch.stack(means).sum(2, dtype=torch.float64)
            self.hits[place] += torch.stack(shares).sum(2, dtype=torch.float64)
        self.rows += v.shape[1]

    def compute(self) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, int]]]:
        """Return mean -> values_S, and share -> (hits_S, number of samples); names are `<measure>_at_<n>`."""
        means, shares = {}, {}
        for place, count in enumerate(self.read_after):
            for name, sum_S in zip(MEANS, self.sum_[place], strict=True):
                means[f"{name}_at_{count}"] = sum_S / self.rows
            for name, hits_S in zip(SHARES, self.hits[place], strict=True):
                samples = int(self.rows) * (1 if name == "first_recall" else count)
                shares[f"{name}_at_{count}"] = hits_S, samples
        return means, shares


def measure(
    state_SBKV: Tensor, read_SBNV: Tensor, query_SBNK: Tensor, key_SBNK: Tensor, v: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the means of `MEANS`, and the numbers of hits of `SHARES`, of each row: [S, B]."""
    error_SBN = _relative_error(read_SBNV, v)
    similarity_SBN = cosine_similarity(read_SBNV, v, dim=-1)
    hit_SBN = _own_is_largest(normalize(read_SBNV, dim=-1) @ normalize(v, dim=-1).mT)
    # What attention over the keys reads: one blend of what lies under each key
    score_SBNN = query_SBNK @ key_SBNK.mT
    soft_SBNV = score_SBNN.softmax(-1) @ (key_SBNK @ state_SBKV)
    means = [
        error_SBN.mean(2),
        error_SBN[:, :, 0],
        error_SBN[:, :, -1],
        similarity_SBN.mean(2),
        similarity_SBN[:, :, 0],
        similarity_SBN[:, :, -1],
        _pair_similarity(key_SBNK),
        state_SBKV.flatten(2).norm(dim=2),
        _relative_error(soft_SBNV, v).mean(2),
    ]
    shares = [hit_SBN.sum(2), hit_SBN[:, :, 0], _own_is_largest(score_SBNN).sum(2)]
    return means, shares


def _relative_error(read_SBNV: Tensor, v: Tensor) -> Tensor:
    error_SBN: Tensor = (read_SBNV - v).norm(dim=-1) / v.norm(dim=-1)
    return error_SBN


def _own_is_largest(score_SBNN: Tensor) -> Tensor:
    """Return 1 where an item has a larger score with itself than with every other item, else 0; NaN for NaN."""
    itself_NN = torch.eye(score_SBNN.shape[-1], dtype=torch.bool, device=score_SBNN.device)
    others_SBN = score_SBNN.masked_fill(itself_NN, -torch.inf).amax(-1)
    return strictly_above(score_SBNN.diagonal(dim1=-2, dim2=-1), others_SBN)


def _pair_similarity(key_SBNK: Tensor) -> Tensor:
    """Return the mean |cosine| of two different items' keys, [S, B]; 0 for one item."""
    count = key_SBNK.shape[2]
    total_SB = (key_SBNK @ key_SBNK.mT).abs().sum((2, 3)) - key_SBNK.square().sum((2, 3))
    return total_SB.clamp(min=0) / max(count * (count - 1), 1)  # rounding may leave less than 0


class GradientError(Metric):
    """RMS error of gradients over the RMS of exact ones: the largest over the inputs, for each ensemble member.

    Args:
        members: S.
        inputs: Number of inputs.
    """

    full_state_update = False
    errors: Tensor
    squares: Tensor

    def __init__(self, members: int, inputs: int):
        super().__init__()
        for name in ("errors", "squares"):
            zeros = torch.zeros(inputs, members, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, computed: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
        """Add the gradients of some rows, [S, B, ...], computed and exact, for each input."""
        for place, (gradient, reference) in enumerate(zip(computed, exact, strict=True)):
            self.errors[place] += (gradient.double() - reference).square().flatten(1).sum(1)
            self.squares[place] += reference.square().flatten(1).sum(1)

    def compute(self) -> Tensor:
        """Return the values_S; 0 for inputs without an error, and no finite value for gradients that are not finite."""
        return torch.where(self.errors == 0, 0.0, self.errors / self.squares).sqrt().amax(0)


def gradients(
    function: Callable[..., tuple[Tensor, Tensor | None]], inputs: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return the gradients of the sum of output * weight by the inputs, computed in `dtype`.

    Args:
        function: The gated delta rule.
        inputs: Its inputs.
        weight: One number per element of its output.
        dtype: The precision.
    """
    # Lightning tests in inference mode, whose tensors take no part in autograd
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.clone().to(dtype).requires_grad_() for x in inputs]
        total = (function(*leaves)[0] * weight.clone().to(dtype)).sum()
        return torch.autograd.grad(total, leaves, materialize_grads=True)
