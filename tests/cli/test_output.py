"""What a run prints at its start, and what it leaves out."""

import logging
import warnings

import pytest
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from cli import output


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(100, 20).requires_grad_(False)
        self.trained = nn.Linear(3, 2)
        self.empty = nn.Identity()
        self.scale = nn.Parameter(nn.init.zeros_(nn.Linear(1, 1).weight))


def test_the_table_counts_trained_and_frozen_parameters():
    lines = [line.split() for line in output.parameter_table(Parts()).splitlines()]
    assert lines[0] == ["module", "class", "trained", "frozen"]
    assert lines[2:] == [["frozen", "Linear", "0", "2,020"], ["trained", "Linear", "8", "0"], ["total", "9", "2,020"]]


def test_useless_lines_are_left_out(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        rank_zero_info("💡 Tip: buy something")
        rank_zero_info("TPU available: False, using: 0 TPU cores")
        rank_zero_info("GPU available: False, used: False")
    assert caplog.messages == ["GPU available: False, used: False"]


def test_a_run_says_only_what_its_reader_needs(run, capsys):
    steps = ["--trainer.max_steps", 1, "--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1]
    run("fit", "telepathy_v15", *steps)
    printed = "".join(capsys.readouterr())
    assert "bridge" in printed
    for noise in ("💡", "TPU", "FLOPs", "configured so"):
        assert noise not in printed


def test_a_summary_of_the_user_replaces_the_table(run, capsys):
    steps = ["--trainer.max_steps", 1, "--trainer.limit_val_batches", 0, "--test_after_fit", "false"]
    done = run("fit", "telepathy_v15", *steps, "--trainer.callbacks+", "ModelSummary")
    assert sum(isinstance(callback, ModelSummary) for callback in done.trainer.callbacks) == 1
    assert not any(isinstance(callback, output.ParameterTable) for callback in done.trainer.callbacks)
    done = run("fit", "telepathy_v15", *steps, "--trainer.enable_model_summary", "false")
    assert not any(isinstance(callback, output.ParameterTable | ModelSummary) for callback in done.trainer.callbacks)


@pytest.mark.parametrize("ours", [True, False])
def test_the_reduction_hint_is_left_out_for_modules_that_reduce(ours):
    module = type("Made", (nn.Module,), {"__module__": "lightning_modules.telepathy.module" if ours else "mine"})()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output.silence_reduction_hints(module)
        warnings.warn("It is recommended to use `self.log('x', ..., sync_dist=True)` when logging", stacklevel=1)
    assert len(caught) == (0 if ours else 1)
