"""Packed rows of both kernels' references: what one sequence holds leaves the others alone, and rows may be empty."""

import pytest
import torch
from torch import Tensor

from kernels.gated_delta import chunk_gated_delta_rule, recurrent_gated_delta_rule, step_gated_delta_rule
from kernels.phase_scan import accumulate_phase, phase_scan

BOUNDS = torch.tensor([0, 4, 6])
PARTS = slice(0, 4), slice(4, 6)  # the same
FORMS = [chunk_gated_delta_rule, recurrent_gated_delta_rule]


def inputs(B: int, T: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, T, 2, 4)
    return {"q": q, "k": k, "v": v, "g": -torch.rand(B, T, 2), "beta": torch.rand(B, T, 2)}


def scan_inputs(B: int, T: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(B, T, 3), "omega": torch.randn(B, T, 3), "log_decay": -torch.rand(B, T, 3)}


CALLS = [(form, inputs, "g") for form in FORMS] + [(phase_scan, scan_inputs, "log_decay")]


@pytest.mark.parametrize(("form", "make", "decay"), CALLS)
def test_a_decay_to_nothing_is_a_reset(form, make, decay: str):
    values = make(1, 6)
    values[decay][0, 0] = -torch.inf
    tensors = [x.requires_grad_() for x in values.values()]
    packed = form(**values, cu_seqlens=BOUNDS)[0]
    alone = torch.cat([form(**{name: x[:, rows] for name, x in values.items()})[0] for rows in PARTS], 1)
    torch.testing.assert_close(packed, alone)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(packed.sum(), tensors))


@pytest.mark.parametrize(("form", "make", "name"), [(f, inputs, "v") for f in FORMS] + [(phase_scan, scan_inputs, "x")])
def test_a_nan_stays_in_its_sequence(form, make, name: str):
    values = make(1, 6)
    values[name][0, 0] = torch.nan
    outputs, states = form(**values, cu_seqlens=BOUNDS, output_final_state=True)
    assert outputs[0, :4].isnan().any()
    assert outputs[0, 4:].isfinite().all()
    assert states[1].isfinite().all()


@pytest.mark.parametrize(("B", "T", "bounds"), [(1, 0, [0, 0]), (0, 5, None), (1, 0, None)])
@pytest.mark.parametrize(("form", "make", "_decay"), CALLS)
def test_empty_rows(form, make, _decay: str, B: int, T: int, bounds: list[int] | None):
    outputs, states = form(
        **make(B, T), cu_seqlens=None if bounds is None else torch.tensor(bounds), output_final_state=True
    )
    assert outputs.shape[:2] == (B, T)
    assert len(states) == B
    assert not states.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "sead"}, "rule must be one of standard, seed, not sead"),
        ({"q": torch.zeros(2, 2, 8)}, r"q and k must have the same shape \[B, H, K\]"),
        ({"v": torch.zeros(2, 3, 4)}, r"v must be \[2, J, V\] with J a multiple of the 2 heads of k"),
        ({"g": torch.zeros(2, 1)}, r"g must be \[2, 2\], one number per value head, not \[2, 1\]"),
        ({"state": torch.zeros(1, 2, 4, 4)}, r"state must be \[2, 2, 4, 4\], not \[1, 2, 4, 4\]"),
    ],
)
def test_wrong_steps_are_refused(change: dict, message: str):
    step = {name: x[:, 0] for name, x in inputs(2, 1).items()} | {"state": torch.zeros(2, 2, 4, 4)}
    with pytest.raises(ValueError, match=message):
        step_gated_delta_rule(**step | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens needs a batch of one"),
        ({"cu_seqlens": [0, 4]}, r"cu_seqlens must be a tensor of integers \[N \+ 1\], not \[0, 4\]"),
        ({"initial_phase": torch.zeros(2)}, r"initial_phase must be \[2, 3\], not \[2\]"),
        ({"omega": torch.zeros(2, 4, 3).long()}, "omega must be floats"),
    ],
)
def test_wrong_phases_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        accumulate_phase(**{"omega": torch.zeros(2, 4, 3)} | change)
