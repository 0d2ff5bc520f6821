"""The parts of the phase line: initial weights, norms and dropout of the mixer, and the numbers of its training."""

from copy import deepcopy

import pytest
import torch
from test_phase import SIZES, make, rows
from test_phase_training import fit
from torch import Tensor
from torch.nn.functional import gelu

from lightning_modules.core.ensemble import call_members, stack_members
from lightning_modules.phase import Phase
from lightning_modules.phase import module as phase_module
from lightning_modules.phase.angles import Angles
from lightning_modules.phase.lstm import LSTM
from lightning_modules.phase.mixer import PhaseMixer
from lightning_modules.phase.outer import outer_scan
from lightning_modules.phase.sampling import mixed_tokens


@pytest.mark.parametrize("kind", ["query_offset", "offsets", "constrained", "decoupled"])
def test_initial_angles_have_the_spread_that_is_told(kind):
    angles, x_BTD = Angles(64, 2, 4, kind), torch.randn(1, 9000, 64)
    spread_F = 0.5 * angles.frequency_F
    expected = {"omega": spread_F, "offset": spread_F if kind == "decoupled" else torch.ones(8)}
    if kind == "offsets":
        expected["key_offset"] = torch.ones(8)
    for name, deviation_F in expected.items():
        y_TF = angles.get_submodule(name)(x_BTD)[0]
        # The deviation of a draw of 64 weights is that of the distribution to 9 %
        torch.testing.assert_close(y_TF.std(0) / deviation_F, torch.ones(8), rtol=0, atol=0.4)
        assert 0.8 < (y_TF.std(0) / deviation_F).mean() < 1.2


def seen(mixer: PhaseMixer) -> dict[str, Tensor]:
    """Run the mixer, and return the outputs of its parts, and the input and output of `out_proj`."""
    kept: dict[str, Tensor] = {}
    for name, part in mixer.named_modules():
        part.register_forward_hook(lambda module, args, output, name=name: kept.update({name: output}))
    mixer.out_proj.register_forward_hook(lambda module, args, output: kept.update({"before": args[0]}))
    mixer(torch.randn(2, 70, 16))
    return kept


@pytest.mark.parametrize(("frequencies", "groups"), [(None, 1), (3, 2)])
def test_the_output_is_a_map_of_the_memory_over_its_root_mean_square(frequencies, groups):
    kept = seen(mixer := PhaseMixer(16, 2, frequencies))
    read_BTGV = kept["read"].unflatten(2, (groups, -1))
    expected = read_BTGV / (read_BTGV.square().mean(3, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(kept["before"], expected.flatten(2))
    mixer.norm.weight.data.zero_()
    assert (seen(mixer)["before"] == 0).all()
    if frequencies is None:
        for normalise in ("mass", "none"):
            plain = seen(PhaseMixer(16, 2, normalise=normalise))
            torch.testing.assert_close(plain["before"], plain["read"])


def test_dropout_zeroes_inputs_of_the_output_map_behind_a_gelu():
    mixer = PhaseMixer(16, 2, expansion=3, dropout=0.3, normalise="none")
    kept = seen(mixer)
    assert 0.25 < (kept["before"] == 0).float().mean() < 0.35
    assert (kept["out_proj"] != 0).all()
    kept = seen(mixer.eval())
    torch.testing.assert_close(kept["before"], gelu(kept["up_proj.0"]))


def test_members_drop_outputs_of_their_own():
    module = make("P", residual_dropout=0.5)
    stacked = stack_members(lambda: deepcopy(module.network), [5, 5])
    (logits_SBTV,) = call_members(stacked, 2, rows())
    assert not torch.isclose(*logits_SBTV).any(2).all()
    (logits_SBTV,) = call_members(stacked.eval(), 2, rows())
    torch.testing.assert_close(*logits_SBTV)


def test_equal_inputs_find_each_other_from_the_start():
    memory = PhaseMixer(16, 2, frequencies=3).memory
    assert torch.equal(memory.q_proj.weight, memory.k_proj.weight)
    assert memory.q_proj.weight is not memory.k_proj.weight


def test_phases_of_a_long_row_stay_exact_in_fp32():
    rows = [torch.randn(1, 3000, 2, 3, dtype=torch.float64).float() for _ in range(6)]
    rows[3] = 3 + rows[3] / 9  # 9000 radians in the end
    decay_BTH, memory_BHFV = torch.full((1, 3000, 2), -0.05), torch.zeros(1, 2, 6, 3)
    exact, computed = (
        outer_scan(*(x.to(dtype) for x in (*rows, decay_BTH, memory_BHFV)))[0]
        for dtype in (torch.float64, torch.float32)
    )
    torch.testing.assert_close(computed.double(), exact, rtol=0, atol=2e-4)


def test_attention_reads_as_far_as_rows_of_the_data_reach():
    assert Phase(**SIZES, pattern="A").network.blocks[0].mixer.window == SIZES["seq_len"]


def test_a_compiled_ensemble_of_lstms_has_the_cell_of_pytorch():
    mixer = LSTM(6).double()
    x_BTD = torch.randn(3, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer._by_position(x_BTD), mixer(x_BTD))


def test_each_member_samples_with_numbers_of_its_own():
    tokens_BT, logits_SBTV = torch.zeros(4, 50, dtype=torch.long), torch.zeros(2, 4, 50, 9)
    mixed_SBT = mixed_tokens(tokens_BT, tokens_BT, logits_SBTV, 0.5, [7, 8], 3)
    assert not torch.equal(*mixed_SBT)
    for member, seed in enumerate((7, 8)):
        assert torch.equal(mixed_SBT[member], mixed_tokens(tokens_BT, tokens_BT, logits_SBTV[:1], 0.5, [seed], 3))


def test_the_share_of_samples_rises_and_samples_are_tokens_of_the_data(tmp_path, monkeypatch):
    calls: list[tuple[object, ...]] = []

    def spy(tokens: Tensor, labels: Tensor, logits_SBTV: Tensor, *numbers: object) -> Tensor:
        calls.append((*numbers, logits_SBTV.shape[3], logits_SBTV.requires_grad))
        return mixed_tokens(tokens, labels, logits_SBTV, *numbers)

    monkeypatch.setattr(phase_module, "mixed_tokens", spy)
    trained = fit(tmp_path, pattern="P", scheduled_sampling=0.8, more_tokens=5)
    size = trained.vocab_size - 5
    assert calls == [(pytest.approx(0.2 * step), [0], step, step, 0, size, False) for step in range(4)]
