"""Effective window and coherence against the sums of their definitions, and in known cases."""

import pytest
import torch
from torch import Tensor

from lightning_modules.phase import Phase
from lightning_modules.phase.measures import memory_measures, phase_mixers

ROWS, LENGTH = 3, 50


def seen(omega: Tensor, decay: Tensor | None = None, mass: Tensor | None = None) -> dict[str, Tensor]:
    named = {"angles.advance": omega, "decay.log_decay": decay, "mass.mass": mass}
    return {site: x for site, x in named.items() if x is not None}


@pytest.mark.parametrize("window", [None, 7])
def test_the_measures_are_the_sums_of_their_definitions(window):
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(2, ROWS, LENGTH, 6, generator=generator)
    decay, mass = (torch.rand(2, ROWS, LENGTH, 3, generator=generator) for _ in range(2))  # two phases in each group
    measures = memory_measures(seen(omega, -decay, mass), window)
    for member in range(2):
        windows, lengths = [], []
        for row in range(ROWS):
            for t in range(LENGTH):
                first = 0 if window is None else max(0, t - window + 1)
                weight_SF = torch.stack(
                    [(-decay[member, row, s + 1 : t + 1]).sum(0).exp() for s in range(first, t + 1)]
                )
                weight_SF = weight_SF.repeat_interleave(2, 1)
                phase_SF = torch.stack([omega[member, row, s + 1 : t + 1].sum(0) for s in range(first, t + 1)])
                heavy_SF = weight_SF * mass[member, row, first : t + 1].repeat_interleave(2, 1)
                sum_F = (heavy_SF * torch.complex(phase_SF.cos(), -phase_SF.sin())).sum(0)
                if t == LENGTH - 1:
                    windows.append(weight_SF.sum(0).mean())
                if t >= LENGTH // 2:
                    lengths.append((sum_F.abs() / heavy_SF.sum(0)).mean())
        torch.testing.assert_close(measures["effective_window"][member], torch.stack(windows).mean())
        torch.testing.assert_close(measures["coherence"][member], torch.stack(lengths).mean(), rtol=1e-4, atol=1e-4)


def test_known_cases():
    still, random = torch.zeros(1, ROWS, 400, 8), torch.rand(1, ROWS, 400, 8) * 2 * torch.pi
    measures = memory_measures(seen(still), None)
    torch.testing.assert_close(measures["coherence"], torch.ones(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(measures["effective_window"], torch.tensor([400.0]))
    assert memory_measures(seen(random), None)["coherence"] < 0.1  # 1 / sqrt(n)
    decay = torch.full([1, 4], 0.9).log()
    torch.testing.assert_close(memory_measures(seen(still, decay), None)["effective_window"], torch.tensor([10.0]))
    torch.testing.assert_close(memory_measures(seen(still), 16)["effective_window"], torch.tensor([16.0]))


def test_phase_mixers_of_a_network():
    module = Phase(11, 8, 16, 2, pattern="PGP", seed=0)
    assert list(phase_mixers(module)) == ["network.blocks.0.phase", "network.blocks.2.phase"]
