"""The phase scan with members of an ensemble and other types, and the arguments that it refuses."""

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from toy_phase_scan import Toy

from kernels.phase_scan import phase_scan, step_phase_scan, zero_state
from kernels.phase_scan.configurations import TABLE


@pytest.mark.parametrize("toy", [Toy(), Toy(decay="channel", window=6), Toy(B=1, bounds=(0, 7, 33))], ids=str)
def test_members_of_an_ensemble(toy: Toy):
    members = [toy.inputs(seed) for seed in range(3)]
    shared = members[0].pop("initial_state")
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}

    def call(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return phase_scan(**rows, **toy.options, initial_state=shared, output_final_state=True)

    together = vmap(call)(stacked)
    alone = [call({name: v[member] for name, v in stacked.items()}) for member in range(3)]
    torch.testing.assert_close(
        together, tuple(torch.stack(x) for x in zip(*alone, strict=True)), rtol=1e-10, atol=1e-10
    )


def test_types():
    inputs = Toy(dtype=torch.bfloat16).inputs()
    y, final = phase_scan(**inputs, normalise=True, output_final_state=True)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert phase_scan(**inputs, normalise=True)[1] is None
    with torch.autocast("cpu", torch.bfloat16):
        again = phase_scan(**inputs, normalise=True, output_final_state=True)
    assert again[0].equal(y)
    assert again[1].equal(final)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 40)}, r"x must be \[B, T, D\] with at least one channel, not \[2, 40\]"),
        ({"x": torch.zeros(2, 40, 3, dtype=torch.long)}, "x must be fp32, bf16, fp16 or fp64, not torch.int64"),
        ({"omega": torch.zeros(2, 40, 1)}, r"omega must be \[2, 40, 3\], as x, not \[2, 40, 1\]"),
        ({"mass": torch.zeros(3)}, r"mass must be \[2, 40, 3\], as x, not \[3\]"),
        ({"log_decay": torch.zeros(2)}, r"log_decay must be \[2, 40, 3\], as x, or \[3\], one number per channel, not"),
        ({"read_offset": torch.zeros(2, 40, 3).long()}, "read_offset must be a float tensor, not torch.int64"),
        ({"window": 0}, "window must be a whole number from 1 on, the position itself, not 0"),
        ({"initial_state": torch.zeros(2, 2, 3)}, r"initial_state must be \[2, 3, 3\], the shape of zero_state, not"),
        ({"initial_state": torch.zeros(2, 3, 3), "window": 5}, r"initial_state must be \[2, 4, 3, 3\]"),
        ({"initial_state": torch.zeros(2, 3, 3)}, "initial_state must be torch.float64 beside torch.float64 values"),
        ({"cu_seqlens": torch.tensor([0, 40])}, "cu_seqlens needs a batch of one"),
        ({"cu_seqlens": torch.tensor([0, 9, 8, 40]), "B": 1}, "cu_seqlens must rise from 0 to at most 40"),
        ({"omega": None}, "omega must be a tensor, not None"),
        ({"mass": torch.zeros(2, 40, 3, device="meta")}, "mass must be on cpu, as x, not on meta"),
        ({"backend": "cuda"}, "backend must be one of reference, triton, not cuda"),
        ({"backend": "triton"}, "computes in fp32"),
        ({"backend": "triton", "window": 5, "initial_state": None}, "no window with decays or normalise"),
        ({"backend": "triton", "dtype": torch.float32}, "needs tensors on a GPU, not on cpu"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    sizes = {name: change.pop(name) for name in ("B", "dtype") if name in change}
    inputs = Toy(**sizes).inputs() | {"normalise": True} | change
    with pytest.raises(ValueError, match=message):
        phase_scan(**inputs)


def test_wrong_steps_are_refused():
    x, state = torch.zeros(2, 3), zero_state(2, 3, window=4)
    with pytest.raises(ValueError, match=r"x must be \[B, D\], one position, not \[2, 1, 3\]"):
        step_phase_scan(x[:, None], x[:, None], state)
    with pytest.raises(ValueError, match=r"state must be \[2, 3, 3, 3\], the shape of zero_state, not \[2, 3, 2, 3\]"):
        step_phase_scan(x, x, state, normalise=True)


@pytest.mark.parametrize("kind", TABLE, ids=str)
def test_states_of_the_forward_are_at_the_ends_of_its_groups(kind):
    how = TABLE[kind]
    assert how.backward.tile % how.forward.rows == 0
