"""The gates before an expensive run: all pass on the embedded pair, and each can fail."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import QUIET, SMALL
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from callbacks import Gates
from datamodules import WordProblems
from lightning_modules.telepathy import KVBridge, PerceiverBridge, by_heart

NAMES = ("text", "embeddings", "overfit", "soft_prompt")
PRESET = ("validate", "--config", "configs/telepathy_v15.yaml", "--config", "configs/presets/telepathy/gates.yaml")
SIZES = {"data.test_sets.test": 16, "data.eval_batch_size": 32, "data.validation_size": 32}
SIZES |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"}


@pytest.fixture
def check(caplog):
    """Runs gates on a module; returns the line of each gate, and the metrics."""

    def run(module, steps: int, least_accuracy: float = 0.45, **flags) -> tuple[dict[str, str], dict[str, float]]:
        flags |= QUIET | {"accelerator": "cpu", "limit_val_batches": 1}
        trainer = Trainer(callbacks=Gates(8, least_accuracy, steps), **flags)
        with caplog.at_level("INFO"):
            trainer.validate(module, datamodule=WordProblems(**SMALL | {"eval_batch_size": 8}), verbose=False)
        said = [record.message for record in caplog.records if record.message.startswith("gate ")]
        lines = {line.split()[1].rstrip(":"): line for line in said}
        assert tuple(lines) == NAMES
        return lines, {name: value.item() for name, value in trainer.callback_metrics.items()}

    return run


def test_the_embedded_pair_passes_every_gate(workplace, caplog):
    with caplog.at_level("INFO"):
        done = main.main([*PRESET, *(text for key, value in SIZES.items() for text in (f"--{key}", str(value)))])
    lines = [record.message for record in caplog.records if record.message.startswith("gate ")]
    assert [line.split()[1].rstrip(":") for line in lines] == [*NAMES]
    assert all(line.endswith(": passed") for line in lines)
    record = json.loads(Path(done.run_dir, "results.json").read_text())
    metrics = record["metrics"]
    assert [metrics[f"gates/{name}_passed"] for name in NAMES] == [1, 1, 1, 1]
    assert metrics["gates/text_accuracy"] >= 0.9
    assert metrics["gates/embeddings_accuracy"] == pytest.approx(metrics["gates/text_accuracy"], abs=0.02)
    assert metrics["gates/embeddings_ce_gap"] < 1e-3
    assert metrics["gates/overfit_loss"] <= 0.1
    assert metrics["gates/soft_prompt_loss"] <= 0.05
    assert record["n"]["gates/text_accuracy"] == 32
    assert record["intervals"]["gates/text_accuracy"][0] > 0.8
    events = EventAccumulator(str(done.run_dir))
    events.Reload()
    assert {name for name in metrics if name.startswith("gates/")} <= set(events.Tags()["scalars"])


def test_every_gate_can_fail_and_says_what_that_means(telepathy, check):
    # Without a prompt, with the BOS in the middle, question embeddings are not read as the text is
    module = telepathy(PerceiverBridge, reproduce_flaws=["bos_behind"])
    lines, metrics = check(module, steps=2, least_accuracy=1.0)
    assert [metrics[f"gates/{name}_passed"] for name in NAMES[1:]] == [0, 0, 0]
    assert metrics["gates/embeddings_ce_gap"] > 0.1
    for name, meaning in (
        ("embeddings", "do not arrive as its text does"),
        ("overfit", "cannot learn a few problems by heart"),
        ("soft_prompt", "cannot be steered"),
    ):
        assert f": FAILED, {'the bridge ' if name == 'overfit' else ''}" in lines[name]
        assert meaning in lines[name]


def test_a_target_that_cannot_solve_the_problems_fails_the_first_gate(telepathy, check):
    module = telepathy()
    module.max_new_tokens = 2  # too few for any answer
    lines, metrics = check(module, steps=1)
    assert metrics["gates/text_accuracy"] == metrics["gates/text_passed"] == 0
    assert "accuracy 0 of 8 (at least 0.45): FAILED, the target hardly solves these problems" in lines["text"]


def test_the_targets_own_keys_and_values_answer_as_the_text(telepathy, check):
    _, metrics = check(telepathy(KVBridge, [1, 2]), steps=1)
    assert metrics["gates/embeddings_passed"] == 1
    assert metrics["gates/embeddings_ce_gap"] < 1e-4


def test_gates_change_neither_weights_nor_random_numbers(telepathy, check):
    module = telepathy(optimizer=partial(torch.optim.AdamW, lr=1e-2))
    before, modes = {name: value.clone() for name, value in module.state_dict().items()}, []
    module.bridge.register_forward_pre_hook(lambda bridge, args: modes.append(bridge.training))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    _, metrics = check(module, steps=6)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert metrics["gates/overfit_loss"] < 2.2  # although a copy has learned; 2.6 before
    # As in a fit, where a bridge that samples draws other noise in each step; then comes the validation
    assert modes == [True] * 7 + [False]


def test_a_bridge_learns_by_heart_with_the_clipping_of_the_run(telepathy, check):
    module = telepathy(optimizer=partial(torch.optim.SGD, lr=1.0))
    losses = [check(module, steps=5, gradient_clip_val=clip)[1]["gates/overfit_loss"] for clip in (1e-6, None)]
    assert losses[0] > losses[1] + 0.05


@pytest.mark.parametrize(
    ("losses", "end", "looks"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], 0.2, [0, 5, 7]),
        ([0.9, 0.8, 0.0, 0.6, 0.5, 0.05], 0.05, [0, 5]),  # low between two looks, and at the second one
        ([0.05], 0.05, [0]),
    ],
)
def test_learning_ends_at_a_low_loss_or_after_the_steps(monkeypatch, losses, end, looks):
    x, done, looked = torch.zeros((), requires_grad=True), [], []
    strategy = SimpleNamespace(reduce=lambda loss, reduce_op: looked.append(len(done)) or loss)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(train_step_context=nullcontext), strategy=strategy)
    module = SimpleNamespace(trainer=trainer, target=SimpleNamespace(logits=lambda packing, vectors: vectors))
    monkeypatch.setattr(by_heart, "lm", lambda logits, labels: logits)
    batch = {"soft": SimpleNamespace(labels_N=None)}
    loss = by_heart._descend(module, batch, lambda: (x + losses[len(done)], 2 * x), lambda: done.append(x.grad), 7, 0.1)
    assert (loss, looked, len(done)) == (pytest.approx(end), looks, looks[-1])
    assert x.grad is None or x.grad == 3 * len(done)  # of the loss and of what is beside it


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_codebook_is_trained_with_the_bridge(telepathy, check, weight):
    module = telepathy(bottleneck="vq", objectives={"lm": 1.0, "commitment": weight})
    book, trained = module.bottleneck.quantizer.code_transform.change_DD, []
    book.register_hook(lambda grad_DD: trained.append(bool(grad_DD.any())))
    check(module, steps=1)
    assert any(trained) == (weight > 0)
    assert not book.any()


def test_a_loss_that_is_not_finite_fails(telepathy, check):
    module = telepathy()
    torch.nn.init.constant_(module.bridge.end_D, torch.nan)
    lines, metrics = check(module, steps=1)
    assert metrics["gates/overfit_passed"] == 0
    assert "loss nan" in lines["overfit"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"least_accuracy": 1.5}, r"Gates.least_accuracy must be at most 1"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Gates(**options)


def test_other_commands_and_modules(telepathy, fit):
    with pytest.raises(ValueError, match="Gates belong to the command validate: leave them out of the others"):
        fit(telepathy(), 1, callbacks=[Gates()])
    with pytest.raises(ValueError, match=r"Gates needs `gates\(...\)`, which BoringModel does not have"):
        Trainer(callbacks=Gates(), accelerator="cpu", **QUIET).validate(BoringModel())
