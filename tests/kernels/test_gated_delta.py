"""The reference of the gated delta rule: the definition, its other forms, gradients, causality, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from toy_gated_delta import Toy

from kernels.gated_delta import chunk_gated_delta_rule, recurrent_gated_delta_rule, reference, step_gated_delta_rule

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def by_steps(q, k, v, g, beta, scale, state, final, normalise, rule):
    outputs = []
    for t in range(v.shape[1]):
        o, state = step_gated_delta_rule(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state, scale, normalise, rule)
        outputs.append(o)
    return torch.stack(outputs, 1), state


def in_two_parts(q, k, v, g, beta, scale, state, final, normalise, rule):
    outputs = []
    for part in (slice(0, 13), slice(13, None)):
        rows = (x[:, part] for x in (q, k, v, g, beta))
        o, state = chunk_gated_delta_rule(*rows, scale, state, True, normalise, rule=rule)
        outputs.append(o)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize(
    ("toy", "rule"),
    [
        (Toy(T=1), "standard"),
        (Toy(T=32, J=1), "standard"),
        (Toy(T=65, H=2, J=4, unit=False), "standard"),
        (Toy(T=65, H=2, J=4, unit=False), "seed"),
        (Toy(decay=300.0, beta=2.0), "standard"),
        (Toy(decay=1e5), "standard"),
        (Toy(decay=0.0, beta=2.0), "standard"),
        (Toy(decay=100.0), "seed"),
        (Toy(beta=0.0), "standard"),
    ],
)
def test_all_forms_agree(toy: Toy, rule: str):
    inputs = [x.requires_grad_() for x in toy.inputs()]
    arguments = *inputs[:5], 0.7, inputs[5], True, not toy.unit
    expected = None
    for form in (recurrent_gated_delta_rule, chunk_gated_delta_rule, in_two_parts, by_steps):
        o, state = form(*arguments, rule=rule)
        gradients = torch.autograd.grad(o.sin().sum() + state.sin().sum(), inputs, materialize_grads=True)
        found = o, state, *gradients
        expected = expected or found
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_definition():
    """One head, written beside the formula."""
    *rows, states = Toy(J=1).inputs()
    q, k, v, g, beta = (x[0, :, 0] for x in rows)
    for rule in ("standard", "seed"):
        S, expected = states[0, 0], []
        for t in range(40):
            decayed = g[t].exp() * S
            error = v[t] - (decayed if rule == "standard" else S).T @ k[t]
            S = decayed + beta[t] * torch.outer(k[t], error)
            expected.append(S.T @ (q[t] * 8**-0.5 if rule == "standard" else k[t]))
        o, last = chunk_gated_delta_rule(*rows, None, states, True, rule=rule)
        torch.testing.assert_close(o[0, :, 0], torch.stack(expected), **TOLERANCE)
        torch.testing.assert_close(last[0, 0], S, **TOLERANCE)


@pytest.mark.parametrize("form", [reference.recurrent_gated_delta_rule, reference.chunk_gated_delta_rule])
@pytest.mark.parametrize("bounds", [None, (0, 2, 2, 6)])
def test_gradients(form, bounds):
    toy = Toy(B=1, T=7, K=2, V=3, bounds=bounds, unit=False)
    options = {"chunk": 4} if form is reference.chunk_gated_delta_rule else {}

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        return form(*x[:5], None, x[5], True, True, toy.cu_seqlens, **options)

    assert torch.autograd.gradcheck(both, [x.requires_grad_() for x in toy.inputs()])


def test_gate_gradient_under_strong_decay():
    """Differences of sums of log-decays would leave rounding errors far above a gradient of 1e-22."""
    *rows, _ = Toy(B=1, decay=0.0).inputs()
    rows[3] = torch.full_like(rows[3], -50.0).requires_grad_()
    forms = chunk_gated_delta_rule, recurrent_gated_delta_rule
    found, expected = (torch.autograd.grad(form(*rows)[0].sin().sum(), rows[3])[0] for form in forms)
    assert 0 < expected.abs().max() < 1e-20
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-32)


def test_packed_sequences():
    toy = Toy(B=1, T=80, bounds=(0, 0, 5, 70, 70, 71, 71))
    *rows, states = toy.inputs()
    o, final = chunk_gated_delta_rule(*rows, None, states, True, cu_seqlens=toy.cu_seqlens)
    torch.testing.assert_close(o, recurrent_gated_delta_rule(*rows, None, states, cu_seqlens=toy.cu_seqlens)[0])
    assert o[:, 71:].eq(0).all()
    for n, (first, last) in enumerate(zip(toy.bounds, toy.bounds[1:], strict=False)):
        part, state = chunk_gated_delta_rule(*(x[:, first:last] for x in rows), None, states[n : n + 1], True)
        torch.testing.assert_close(o[:, first:last], part, **TOLERANCE)
        torch.testing.assert_close(final[n], state[0], **TOLERANCE)


def test_causality_is_exact():
    *rows, state = (x.requires_grad_() for x in Toy(T=70).inputs())
    o, _ = chunk_gated_delta_rule(*rows, None, state)
    for t in (0, 31, 32, 68):
        for gradient in torch.autograd.grad(o[:, t].sum(), rows, retain_graph=True):
            assert gradient[:, t + 1 :].eq(0).all()
            assert gradient[:, t].ne(0).any()


def test_members_of_an_ensemble():
    members = [Toy().inputs(seed) for seed in range(3)]
    stacked = [torch.stack(x) for x in zip(*members, strict=True)]
    state = members[0][5]

    def call(*rows: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_gated_delta_rule(*rows, None, state, True)

    together = vmap(call)(*stacked[:5])
    alone = [call(*member[:5]) for member in members]
    torch.testing.assert_close(together, tuple(torch.stack(x) for x in zip(*alone, strict=True)), **TOLERANCE)


def test_types():
    *rows, state = Toy(dtype=torch.bfloat16).inputs()
    o, final = chunk_gated_delta_rule(*rows, None, state, True)
    assert o.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert chunk_gated_delta_rule(*rows)[1] is None
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(chunk_gated_delta_rule(*rows, None, state, True)[1], final, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 40, 1, 4)}, "q and k must have the same shape"),
        ({"v": torch.zeros(2, 40, 3, 4), "H": 2}, "J a multiple of the 2 heads of k, not"),
        ({"g": torch.zeros(2, 40, 1)}, r"g must be \[2, 40, 2\]"),
        ({"beta": torch.zeros(2, 40, 2, dtype=torch.long)}, "beta must be a float tensor, not torch.int64"),
        ({"K": 260}, "K must be a multiple of 4 from 4 to 256, not 260"),
        ({"V": 6}, "V must be a multiple of 4 from 4 to 256, not 6"),
        ({"v": torch.zeros(2, 40, 2, 4)}, "q, k and v must all be fp32, bf16, fp16 or fp64"),
        ({"initial_state": torch.zeros(2, 2, 4, 8)}, r"initial_state must be \[2, 2, 8, 4\], not \[2, 2, 4, 8\]"),
        ({"initial_state": torch.zeros(2, 2, 8, 4)}, "initial_state must be torch.float64 beside torch.float64"),
        ({"cu_seqlens": torch.tensor([0, 40])}, "cu_seqlens needs a batch of one"),
        ({"cu_seqlens": torch.tensor([0.0, 40.0])}, "cu_seqlens must be integers"),
        ({"cu_seqlens": torch.tensor([0, 9, 8, 40]), "B": 1}, "cu_seqlens must rise from 0 to at most 40"),
        ({"scale": math.nan}, "scale must be a finite number, not nan"),
        ({"scale": True}, "scale must be a finite number, not True"),
        ({"scale": "0.3"}, "scale must be a finite number, not 0.3"),
        ({"beta": 0.5}, "beta must be a tensor, not 0.5"),
        ({"g": torch.zeros(2, 40, 2, device="meta")}, "g must be on cpu, as q, not on meta"),
        ({"initial_state": torch.zeros(2, 2, 8, 4, device="meta")}, "initial_state must be on cpu, as q, not on meta"),
        ({"backend": "cuda"}, "backend must be one of reference, triton, not cuda"),
        ({"backend": "triton"}, "computes in fp32"),
        ({"backend": "triton", "dtype": torch.float32}, "needs tensors on a GPU, not on cpu"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    sizes = {name: change.pop(name) for name in ("B", "H", "K", "V", "dtype") if name in change}
    arguments = dict(zip(("q", "k", "v", "g", "beta"), Toy(**sizes).inputs(), strict=False)) | change
    with pytest.raises(ValueError, match=message):
        chunk_gated_delta_rule(**arguments)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"q": torch.int64, "k": torch.int64, "v": torch.int64}, "q, k and v must all be fp32, bf16, fp16 or fp64"),
        ({"k": torch.bfloat16}, "q, k and v must all be fp32, bf16, fp16 or fp64"),
        ({"beta": torch.int64}, "beta must be a float tensor"),
        ({"state": torch.float16}, "state must be torch.float32 beside torch.float32 values"),
    ],
)
def test_wrong_types_of_a_step_are_refused(types: dict, message: str):
    shapes = {"q": (1, 2, 4), "k": (1, 2, 4), "v": (1, 2, 4), "g": (1, 2), "beta": (1, 2), "state": (1, 2, 4, 4)}
    tensors = {name: torch.zeros(shape, dtype=types.get(name, torch.float32)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        step_gated_delta_rule(**tensors)
