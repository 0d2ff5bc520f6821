"""A run of each line at a learning rate of a million: it ends as diverged, in a sentence, and reports no measure."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

import main

PROBLEMS = {"batch_size": 8, "epoch_size": 800, "validation_size": 16, "eval_batch_size": 16, "num_workers": 0}
TOKENS = {"batch_size": 4, "validation_size": 8, "eval_batch_size": 8, "test_size": 8, "seq_len": 16, "vocab_size": 32}
LINES = {
    "configs/telepathy_v15.yaml": {"model.max_new_tokens": 4, "data.test_sets": "{test: 8}"},
    "configs/telepathy_v16.yaml": {"model.max_new_tokens": 4, "data.test_sets": "{test: 8}"},
    "configs/telepathy_v18.yaml": {"model.max_new_tokens": 4, "data.test_sets": "{test: 8}"},
    "configs/separability_interleaved.yaml": {"model.seq_len": 16, "model.vocab_size": 32},
    "configs/separability_grokking_small.yaml": {},
    "configs/pair_source.yaml": {
        "model.save_to": "made",
        "model.tokenizer": "assets/pair/source",
        "model.max_new_tokens": 4,
        "data.test_sets": "{test: 8}",
        "trainer.precision": "32-true",
    },
    "tests/example_line/recurrence_interleaved.yaml": {"model.seq_len": 16, "model.vocab_size": 32},
}


@pytest.mark.parametrize("config", LINES)
def test_a_run_at_a_rate_of_a_million(workplace, capsys, config):
    (workplace / "tests").symlink_to(ROOT / "tests")
    of_problems = "telepathy" in config or "pair" in config
    data = PROBLEMS if of_problems else {} if "grokking" in config else TOKENS
    keys = {f"data.{key}": value for key, value in data.items()} | LINES[config]
    keys |= {"model.optimizer.lr": 1e6, "trainer.max_steps": 60, "trainer.val_check_interval": 20}
    keys |= {"trainer.check_val_every_n_epoch": "null", "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 10}
    keys |= {"trainer.callbacks": "[]", "trainer.enable_progress_bar": "false", "trainer.default_root_dir": "hot"}
    with pytest.raises(SystemExit) as ended:
        main.main(["fit", "--config", config, *(f"--{key}={value}" for key, value in keys.items())])
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    assert errors.count("error: the run has diverged: the loss is not finite since step") == 1
    assert "Traceback" not in errors
    record = json.loads(Path("hot/results.json").read_text())
    assert (record["status"], record["metrics"], record["intervals"]) == ("diverged", {}, {})
    assert not Path("made").exists()
