"""The state probe reports the measures of each mixer, and finds what a model was made to do."""

import json

import pytest
import torch
from conftest import QUIET
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import RunRecord, StateProbe
from datamodules import AssociativeRecall, NeedleGym, StateTracking
from datamodules.errors import UserError
from datamodules.sequence_task import collate
from lightning_modules.groundthink import GroundThink
from lightning_modules.groundthink.probes.state import measure_state
from lightning_modules.groundthink.probes.writes import SITES
from lightning_modules.separability import Separability

SIZES = {"vocab_size": 40, "seq_len": 20, "width": 16, "window": 5, "seed": 0}


def make_data(**options) -> NeedleGym:
    sizes = {"batch_size": 4, "validation_size": 4, "test_size": 4, "seed": 0}
    return NeedleGym(**{"needles": 3, "seq_len": 20, "vocab_size": 40} | sizes | options)


def run(folder, module, probe=None, data=None, command="validate"):
    callbacks = [probe or StateProbe(rows=6), RunRecord()]
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **QUIET)
    getattr(trainer, command)(module, datamodule=data or make_data(), verbose=False)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("shifted", [False, True])
def test_every_mixer_is_measured_on_the_rows_of_the_data(shifted, tmp_path):
    module = GroundThink(**SIZES, pattern="GSG", shifted_value=shifted)
    record = run(tmp_path, module, command="test")
    batch = collate(make_data().fixed("test", 6))
    with torch.no_grad():
        _, seen = module.activations(batch["tokens"], [f"*.gated_delta.{site}" for site in SITES])
    for block in (0, 2):
        sites = {site: seen[f"network.blocks.{block}.gated_delta.{site}"][0] for site in SITES}
        expected = measure_state(batch, sites, shifted, range(20, 40))
        other = measure_state(batch, sites, not shifted, range(20, 40))
        for name, value in expected.values.items():
            assert record["metrics"][f"test/block{block}_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert expected.values["self_retrieval_cosine"] != pytest.approx(other.values["self_retrieval_cosine"])
        for name, n in {"self_retrieval": 18, "query_retrieval": 18}.items():
            assert record["n"][f"test/block{block}_{name}"] == n
            assert record["hits"][f"test/block{block}_{name}"] == [round(expected.values[name] * n)]
            low, high = record["intervals"][f"test/block{block}_{name}"]
            assert low <= expected.values[name] <= high


def test_members_of_an_ensemble(tmp_path):
    both = GroundThink(**SIZES, pattern="GS", ensemble=2)
    run(tmp_path / "both", both)
    for member in range(2):
        alone = GroundThink(**SIZES | {"seed": member}, pattern="GS")
        run(tmp_path / str(member), alone)
        names = [name for name in alone.members if "block0" in name]
        assert len(names) > 20
        for name in names:
            torch.testing.assert_close(both.members[name][member], alone.members[name][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("diverged", [0, 1])
def test_a_member_that_has_diverged_leaves_the_others(diverged, tmp_path):
    both, alone = GroundThink(**SIZES, pattern="GS", ensemble=2), GroundThink(**SIZES | {"seed": 1 - diverged})
    for parameter in both.network.parameters():
        parameter.data[diverged] = torch.nan
    logger = TensorBoardLogger(tmp_path / "both")
    trainer = Trainer(accelerator="cpu", callbacks=[StateProbe(rows=6)], **QUIET | {"logger": logger})
    trainer.validate(both, datamodule=make_data(), verbose=False)
    run(tmp_path / "alone", alone)
    names = [name for name in alone.members if "block0" in name]
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(both.members[name][1 - diverged], alone.members[name][0], rtol=1e-4, atol=1e-5)
    assert both.members["validation/block0_effective_rank"][diverged].isnan()


def test_a_memory_made_by_hand_holds_every_needle(tmp_path):
    """Head 0 writes each token's value under the token before it, with beta 1 and no decay; head 1 never writes."""
    module = GroundThink(**SIZES | {"width": 80, "heads": 2}, pattern="G", conv_width=0, shifted_value=True)
    mixer = module.network.blocks[0].gated_delta
    with torch.no_grad():
        module.network.token_embedding.weight.copy_(torch.eye(40, 80))
        for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
            projection.weight.copy_(torch.eye(40, 80).repeat(2, 1))
        mixer.gates.a_proj.weight.zero_()
        mixer.gates.b_proj.weight.zero_()
        mixer.gates.A_log.copy_(torch.tensor([-40.0, 0]))
        mixer.gates.b_proj.bias.copy_(torch.tensor([40.0, -40]))
    metrics = run(tmp_path, module, StateProbe(rows=20))["metrics"]
    found = {name.removeprefix("validation/block0_"): value for name, value in metrics.items() if "block0" in name}
    assert found["head"] == 0
    assert found["write_lag"] == 1  # the value stands one position behind the key
    expected = {"query_match": 1, "self_retrieval": 1, "query_retrieval": 1, "self_retrieval_cosine": 1}
    expected |= {"decay_filler": 1, "beta_write": 1, "key_cosine_needles": 0}
    expected |= {"cosine_after_0": 1, "cosine_after_2": 1, "overwrite_left": 0, "neighbour_loss": 0}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert found["capacity"] == 8  # of the pairs of 60 with different keys, of 19, and different values, of 20


def test_other_tasks_with_needles(tmp_path):
    sizes = {"vocab_size": 40, "batch_size": 4, "validation_size": 4, "test_size": 4}
    data = AssociativeRecall(**sizes, train_sets=[[20, 3, 8]], test_sets=[[20, 3]])
    assert "validation/block0_capacity" in run(tmp_path, GroundThink(**SIZES, pattern="GS"), data=data)["metrics"]


def test_needles_that_all_have_one_key(tmp_path):
    data = make_data(task="identical_markers")
    metrics = run(tmp_path, GroundThink(**SIZES, pattern="GS"), data=data)["metrics"]
    assert metrics["validation/block0_capacity"] == 1
    assert metrics["validation/block0_neighbour_loss"] is None  # there are no two keys


def test_a_picture_and_a_table_of_all_heads(tmp_path):
    from lightning_modules.groundthink.probes import state_report

    module, batch = GroundThink(**SIZES, pattern="GS"), collate(make_data().fixed("test", 6))
    with torch.no_grad():
        _, seen = module.activations(batch["tokens"], [f"*.gated_delta.{site}" for site in SITES])
    sites = {site: seen[f"network.blocks.0.gated_delta.{site}"][0] for site in SITES}
    measures = measure_state(batch, sites, False, range(20, 40))
    table = state_report.markdown(measures)
    beta_H = [f"{float(x):.4g}" for x in measures.by_head["beta_key"]]
    assert f"| beta_key | {beta_H[0]} | {beta_H[1]} |" in table
    figure = state_report.picture(measures, "blocks.0.gated_delta", 8)
    assert f"head {measures.head} holds the needles" in figure.get_suptitle()
    assert [len(axes.patches) for axes in figure.axes[:3]] == [10, 10, 6]  # two heads
    assert [len(axes.lines) for axes in figure.axes[3:]] == [2, 2, 3]
    forgotten, beta = state_report.trace_picture(measures.trace, "blocks.0.gated_delta", 1).axes
    row, keys, values, queries = beta.lines
    assert row.get_ydata().tolist() == sites["gates.beta"][0, :, 1].tolist()
    taken = 1 - sites["gates.log_decay"][0, :, 1].double().exp()
    torch.testing.assert_close(torch.tensor(forgotten.lines[0].get_ydata()), taken, rtol=1e-5, atol=0)
    assert keys.get_xdata().tolist() == [0, 2, 4]
    assert values.get_xdata().tolist() == [1, 3, 5]
    labelled = (batch["labels"][0] >= 0).nonzero()[:, 0]
    assert queries.get_xdata().tolist() == labelled.tolist()
    assert queries.get_ydata().tolist() == sites["gates.beta"][0, labelled, 1].tolist()


@pytest.mark.parametrize("line", ["groundthink", "separability"])
def test_a_control_without_a_state_is_left_alone(line, tmp_path):
    control = GroundThink(**SIZES, pattern="S")
    if line == "separability":
        control = Separability(vocab_size=40, seq_len=20, width=8, heads=2, seed=0)
    with pytest.warns(UserWarning, match=r"StateProbe has nothing to measure: model.pattern has no G"):
        metrics = run(tmp_path, control)["metrics"]
    assert not any("block" in name for name in metrics)


def test_mistakes_are_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="StateProbe: `rows` must be at least 1"):
        StateProbe(rows=0)
    with pytest.raises(
        UserError, match="StateProbe needs a task with needles, such as NeedleGym, under data, not State"
    ):
        run(tmp_path, GroundThink(**SIZES, pattern="G"), data=StateTracking())
