"""Patterns on module and parameter names."""

import pytest
from torch import nn

from lightning_modules.core.sites import match_modules, match_parameters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(2, 2)
        self.k_proj = nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Module()
        self.network.blocks = nn.ModuleList([Block(), Block()])
        self.network.embed = nn.Embedding(4, 2)
        self.network.unembed = nn.Linear(2, 4, bias=False)
        self.network.unembed.weight = self.network.embed.weight
        self.network.final_norm = nn.LayerNorm(2)
        self.final_norm = nn.LayerNorm(2)


def test_whole_names_match_with_wildcards_in_module_order():
    found = match_modules(Model(), ["network.blocks.*.k_proj", "network.blocks.0.*"])
    assert list(found) == ["network.blocks.0.q_proj", "network.blocks.0.k_proj", "network.blocks.1.k_proj"]


def test_ends_of_names_match_only_where_no_whole_name_does():
    model = Model()
    assert list(match_modules(model, "blocks.*.q_proj")) == ["network.blocks.0.q_proj", "network.blocks.1.q_proj"]
    assert match_modules(model, "final_norm") == {"final_norm": model.final_norm}
    assert list(match_parameters(model, "q_proj.bias")) == [f"network.blocks.{i}.q_proj.bias" for i in range(2)]


def test_an_end_of_a_name_begins_at_a_dot():
    with pytest.raises(ValueError, match=r"'proj.bias'"):
        match_parameters(Model(), "proj.bias")


def test_a_shared_parameter_answers_to_both_names_once():
    model = Model()
    assert match_parameters(model, "unembed.weight") == {"network.unembed.weight": model.network.embed.weight}
    assert list(match_parameters(model, ["embed.weight", "unembed.weight"])) == ["network.embed.weight"]


@pytest.mark.parametrize(
    ("find", "pattern", "nearest"),
    [
        (match_modules, "blocks.*.q_porj", "network.blocks.0.q_proj"),
        (match_parameters, ["final_norm.weight", "final_norm.wieght"], "network.final_norm.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_names_itself_and_the_nearest(find, pattern, nearest):
    with pytest.raises(ValueError, match="matches") as error:
        find(Model(), pattern)
    assert repr(pattern if isinstance(pattern, str) else pattern[-1]) in str(error.value)
    assert repr(nearest) in str(error.value)
    assert "\n" not in str(error.value)
