"""A line made by the recipe of CONTRIBUTING.md: nothing is copied, and everything that lines do works."""

import json
from pathlib import Path

import pytest
import torch
from conftest import QUIET, ROOT
from lightning import Trainer

import main
from callbacks import ActivationClamp
from datamodules import InterleavedStreams
from tests.example_line.module import Recurrence
from tests.example_line.network import GRU
from tests.studies.tiny_study import in_this_interpreter

HERE = Path(__file__).parent
SIZES = {"vocab_size": 32, "seq_len": 16, "width": 16, "warmup_steps": 2}


def streams() -> InterleavedStreams:
    return InterleavedStreams(vocab_size=32, seq_len=16, batch_size=8, validation_size=8, test_size=16, seed=0)


def trainer(folder: Path, steps: int, **options) -> Trainer:
    quiet = QUIET | {"accelerator": "cpu", "max_steps": steps, "limit_val_batches": 0, "default_root_dir": folder}
    return Trainer(**quiet | options)


def test_module_and_network_are_short():
    lines = sum(len((HERE / name).read_text().splitlines()) for name in ("module.py", "network.py"))
    assert lines <= 80


def test_a_logit_does_not_depend_on_any_later_token():
    torch.manual_seed(0)
    network, embedded = GRU(7, 8), []
    network.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits_BTV = network(torch.randint(7, (2, 5)))
    for position in range(5):
        gradient_BTD = torch.autograd.grad(logits_BTV[:, position].square().sum(), embedded, retain_graph=True)[0]
        assert (gradient_BTD[:, position + 1 :] == 0).all()
        assert (gradient_BTD[:, : position + 1] != 0).any(2).all()


def test_steps_give_the_logits_of_the_whole_row():
    module = Recurrence(**SIZES, seed=0)
    tokens_BT = torch.randint(32, (2, 6))
    expected_B = module(tokens_BT)[:, -1].argmax(1)
    assert torch.equal(module.generate(tokens_BT, 1)[:, 0], expected_B)


class Small(Recurrence):
    def penalties(self, outputs, batch):
        return {"size": (1.0, outputs[0].square().mean((1, 2, 3)))}


def test_a_penalty_on_the_logits_has_a_gradient():
    tokens_BT = torch.randint(32, (2, 6))
    weight_2VD = []
    for kind in (Recurrence, Small):
        module = kind(**SIZES, seed=0)
        module.training_step({"tokens": tokens_BT, "labels": tokens_BT}, 0).backward()
        weight_2VD.append(module.network.unembed.weight.grad)
    assert not torch.allclose(*weight_2VD)


def test_a_fit_after_one_that_failed_does_not_have_its_record(tmp_path):
    module = Recurrence(**SIZES, seed=0)
    module._step = None
    trainer(tmp_path, 1).fit(module, datamodule=streams())
    assert module.members["train/loss"] > 0


def test_an_ensemble_gives_the_losses_of_separate_runs(tmp_path):
    together = Recurrence(**SIZES, seed=5, ensemble=2)
    trainer(tmp_path, 10).fit(together, datamodule=streams())
    for member in range(2):
        alone = Recurrence(**SIZES, seed=5 + member)
        data = InterleavedStreams(vocab_size=32, seq_len=16, batch_size=8, validation_size=8, test_size=16, seed=member)
        trainer(tmp_path, 10).fit(alone, datamodule=data)
        torch.testing.assert_close(together.members["train/loss"][member], alone.members["train/loss"][0])


def test_its_state_is_clamped(tmp_path):
    module = Recurrence(**SIZES, seed=0)
    clamp = ActivationClamp("final_residual", "zero")
    trainer(tmp_path, 1, callbacks=[clamp]).test(module, datamodule=streams(), verbose=False)
    expected = torch.nn.functional.log_softmax(module.network.unembed.bias, 0)
    assert -expected.max() - 1e-6 <= module.members["test/loss"][0] <= -expected.min() + 1e-6


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_learns_and_predicts_from_the_command_line(workplace):
    config = "tests/example_line/recurrence_interleaved.yaml"
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main.main(["fit", "--config", config, *quiet, "--trainer.default_root_dir", "fitted"])
    results = json.loads(Path("fitted/results.json").read_text())
    assert results["metrics"]["test/accuracy"] > 0.9
    assert results["hits"]["test/accuracy"] == [
        round(results["metrics"]["test/accuracy"] * results["n"]["test/accuracy"])
    ]
    checkpoint = ["--ckpt_path", "fitted/checkpoints/last.ckpt"]
    predict = ["--trainer.default_root_dir", "predicted", "--data.inputs", "[1 2 3]"]
    main.main(["predict", "--config", config, *quiet, *checkpoint, *predict])
    lines = Path("predicted/predictions/positions-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["token"] for line in lines] == ["1", "2", "3"]


def test_it_runs_in_a_study(workplace):
    with in_this_interpreter():
        main.main(["study", "tests/example_line/study.yaml"])
    report = json.loads(Path("runs/studies/study/report.json").read_text())
    assert report["finished"] == report["runs"] == 2
    assert len(report["arms"]["wide"]["values"]["test/accuracy"]) == 4
    assert report["claims"][0]["verdict"] == "held"
