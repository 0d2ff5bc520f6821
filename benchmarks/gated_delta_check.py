"""Compare the gated delta kernels with the definition in fp64 on a GPU, and print the largest errors.

python benchmarks/gated_delta_check.py [--types bfloat16 float16 float32] [--widths 4 64] [--share 1/4]

Errors are RMS(error) / RMS(expected) of outputs, final states and all gradients; numbers that are smaller than the
smallest normal one of their type are divided by that one. The grid has every pair of widths K and V at 500 positions,
and every length at K 64 and V 128, each with six log-decays and a mixture of them, and with three betas, where betas of
at most 1 run twice, also as betas that never exceed 1; grouped heads, normalised keys and packed sequences with empty
ones alternate. The cases have few heads, for which `Problem.fill` narrows the sweeps; in bf16 each one also runs with
the launches of the table, as large batches do. Each case runs twice, which must give the same bits. Compilation takes
most of the time: `--share 1/4` is the first of four parts of the sizes, for processes side by side. The script ends
with exit code 1 and the cases where an error is above its limit or a number is not finite. The fp64 values are those of
the chunk form of `reference.py`, which the tests compare with the definition. Without a GPU, TRITON_INTERPRET=1 runs
the types other than bfloat16 slowly in Triton's interpreter.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.gated_delta import chunk_gated_delta_rule, launch
from kernels.gated_delta.configurations import Launch
from kernels.gated_delta.problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate")
LIMITS_LOW = dict(zip(NAMES, (5e-3, 5e-3, 8e-3, 8e-3, 8e-3, 2e-2, 2e-2, 8e-3), strict=True))
LIMIT_FP32 = 1e-4
WIDTHS = (16, 60, 64, 100, 128, 256)
LENGTHS = (1, 15, 63, 64, 65, 500, 1000, 2048)
DECAYS = (-0.001, -0.1, -1.0, -8.0, -50.0, -50.3)
BETAS = (0.0, 0.98, 2.0)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        dtype: Type of queries, keys and values.
        K: Width of queries and keys.
        V: Width of values.
        T: Positions.
        decay: The log-decay at each position; None draws one of the grid's for each.
        beta: The writing strength at each position.
        groups: Value heads per head of queries and keys.
        packed: Whether the row holds sequences of several lengths, some of them empty, and a rest behind them.
        normalise: Whether the kernel normalises queries and keys.
        negative: Whether the kernel allows for betas above 1.
        narrow: Whether the sweeps have fewer columns than in the table, as for few heads.
    """

    dtype: torch.dtype
    K: int
    V: int
    T: int
    decay: float | None
    beta: float
    groups: int
    packed: bool
    normalise: bool
    negative: bool
    narrow: bool

    def inputs(self) -> tuple[list[Tensor], Tensor | None]:
        """Return q, k, v, g, beta and the initial state, and the bounds of packed sequences."""
        torch.manual_seed(0)
        B, H = (1 if self.packed else 2), 2
        J, cut = H * self.groups, self.T // 3
        bounds = torch.tensor([0, 0, cut, cut, max(self.T - 3, cut)], device=DEVICE) if self.packed else None
        q, k = (torch.randn(B, self.T, H, self.K, device=DEVICE) for _ in range(2))
        if not self.normalise:
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        v = torch.randn(B, self.T, J, self.V, device=DEVICE)
        beta = torch.full((B, self.T, J), self.beta, device=DEVICE)
        decays = torch.tensor(DECAYS if self.decay is None else [self.decay], device=DEVICE)
        g = decays[torch.randint(len(decays), beta.shape, device=DEVICE)]
        state = torch.randn(4 if self.packed else B, J, self.K, self.V, device=DEVICE)
        return [*(x.to(self.dtype) for x in (q, k, v)), g, beta, state], bounds

    def results(self, wide: bool) -> list[Tensor]:
        """Return outputs, final states and gradients, of the reference in fp64 or of the kernels."""
        values, bounds = self.inputs()
        values = [(x.double() if wide else x).requires_grad_() for x in values]
        o, state = chunk_gated_delta_rule(
            *(values[0], values[1], values[2], values[3], values[4]),
            initial_state=values[5],
            output_final_state=True,
            use_qk_l2norm_in_kernel=self.normalise,
            cu_seqlens=bounds,
            allow_negative_eigenvalues=self.negative,
            backend="reference" if wide else "triton",
        )
        assert state is not None
        draw = torch.Generator(DEVICE).manual_seed(1)
        cotangents = [torch.randn(x.shape, device=DEVICE, generator=draw).to(self.dtype) for x in (o, state)]
        given = [x.to(y.dtype) for x, y in zip(cotangents, (o, state), strict=True)]
        gradients = torch.autograd.grad([o, state], values, given, materialize_grads=True)
        return [x.detach() for x in (o, state, *gradients)]

    def errors(self) -> tuple[dict[str, float], bool]:
        """Return the error of each result, and whether two runs of the kernels are equal bit for bit."""
        with nullcontext() if self.narrow else launches_of_the_table():
            expected, found, again = self.results(True), self.results(False), self.results(False)
        errors = {}
        for name, x, y in zip(NAMES, found, expected, strict=True):
            error, size = ((z.double().square().mean()).sqrt().item() if z.numel() else 0.0 for z in (x - y, y))
            errors[name] = error / max(size, torch.finfo(x.dtype).smallest_normal)
        return errors, all(torch.equal(x, y) for x, y in zip(found, again, strict=True))

    def limit(self, name: str) -> float:
        """Return the largest error allowed."""
        return LIMIT_FP32 if self.dtype == torch.float32 else LIMITS_LOW[name]


@contextmanager
def launches_of_the_table() -> Iterator[None]:
    """Run the sweeps as if there were many heads."""

    def fill(problem: Problem, how: Launch, directions: int) -> tuple[int, Launch]:
        return directions * problem.N * problem.J * problem.blocks(how), how

    with (
        patch.object(Problem, "fill", fill),
        patch.object(launch, "plan_forward", launch.plan_forward.__wrapped__),
        patch.object(launch, "plan_backward", launch.plan_backward.__wrapped__),
    ):
        yield


def nan_to_inf(error: float) -> float:
    """Return the error, or infinity for NaN, which `max` may drop."""
    return error if error == error else float("inf")


def cases(types: list[torch.dtype], widths: list[int]) -> Iterator[Case]:
    """Return the grid; the options of the widths and lengths alternate."""
    sizes = [(K, V, 500) for K, V in itertools.product(widths, widths)] + [(64, 128, T) for T in LENGTHS if T != 500]
    for dtype in types:
        for index, (K, V, T) in enumerate(sizes):
            groups, packed, normalise = 1 + index % 2, index // 2 % 2 == 1 and T > 3, index // 4 % 2 == 0
            for narrow in (True, False) if dtype == torch.bfloat16 else (True,):
                for decay, beta in itertools.product((*DECAYS, None), BETAS):
                    for negative in (True, False) if beta <= 1 else (True,):
                        yield Case(dtype, K, V, T, decay, beta, groups, packed, normalise, negative, narrow)


def main() -> None:
    """Print a row per type and size: the largest error of each result over decays and betas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="each K with each V")
    parser.add_argument("--share", default="1/1", help="the part of the sizes to check, such as 1/4")
    options = parser.parse_args()
    part, parts = map(int, options.share.split("/"))
    failures, count = [], 0
    print(f"{'type':<10}{'K':>4}{'V':>4}{'T':>6} " + "".join(f"{name:>9}" for name in NAMES), flush=True)
    grid = cases([getattr(torch, name) for name in options.types], options.widths)
    sizes = itertools.groupby(grid, lambda case: (case.dtype, case.K, case.V, case.T))
    for index, ((dtype, K, V, T), group) in enumerate(sizes):
        if index % parts != part - 1:
            continue
        worst = dict.fromkeys(NAMES, 0.0)
        for case in group:
            errors, repeats = case.errors()
            count += 1
            bad = {name: error for name, error in errors.items() if not error <= case.limit(name)}
            if bad or not repeats:
                failures.append(f"{case}: " + (f"{bad}" if bad else "two runs differ"))
            worst = {name: max(worst[name], nan_to_inf(error)) for name, error in errors.items()}
        name = str(dtype).removeprefix("torch.")
        print(f"{name:<10}{K:>4}{V:>4}{T:>6} " + "".join(f"{error:>9.1e}" for error in worst.values()), flush=True)
    print(f"{count} cases, {len(failures)} failed", *failures[:40], sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
