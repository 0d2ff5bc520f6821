"""`last.ckpt` is never lost or late, and a run that resumes from it is the uninterrupted run."""

import shutil

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from toy_fit import StopAt, Stopped, assert_same, fit, held

from callbacks import LastCheckpoint, StabilityMonitor
from lightning_modules.separability import Separability


class Validations(Callback):
    """Notes the steps of validations and their losses."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        if not trainer.sanity_checking:
            self.seen.append((trainer.global_step, trainer.callback_metrics["validation/loss"].item()))


class Dropped(Separability):
    """Depends on random numbers in every training step."""

    def make_network(self) -> nn.Module:
        network = super().make_network()
        network.blocks[0].mlp = nn.Sequential(network.blocks[0].mlp, nn.Dropout(0.5))
        return network


@pytest.mark.parametrize("steps", [3, 4, 6], ids=["before any validation", "at a validation", "after one"])
def test_it_has_the_last_step(tmp_path, steps):
    module = fit(tmp_path, steps)
    checkpoint = held(tmp_path)
    assert checkpoint["global_step"] == steps
    assert all(torch.equal(value, checkpoint["state_dict"][key]) for key, value in module.state_dict().items())


def test_it_has_the_last_epoch_of_a_run_without_a_validation(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.modular_arithmetic.EPOCH", 4)
    options = {"limit_val_batches": 0, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    for name, steps, epochs in (("epochs", -1, 2), ("steps", 8, -1)):
        fit(tmp_path / name, steps, max_epochs=epochs, **options)
        assert held(tmp_path / name)["global_step"] == 8
        assert not (tmp_path / name / "checkpoints" / "previous.ckpt").exists()  # it saves once


def test_the_checkpoint_before_it_is_kept_and_nothing_else(tmp_path):
    fit(tmp_path, 10)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert (held(tmp_path, "previous")["global_step"], held(tmp_path)["global_step"]) == (8, 10)


def test_it_has_the_state_of_callbacks_after_the_last_validation(tmp_path):
    monitor = StabilityMonitor(reached=0.0, collapsed=0.0)
    fit(tmp_path, 4, callbacks=[monitor])
    state = held(tmp_path)["callbacks"]["StabilityMonitor"]
    assert state["reached_step_S"].item() == 4
    assert state["up_S"].item()


def test_a_stop_before_min_steps_saves_nothing(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    saved = []

    class Count(LastCheckpoint):
        def save(self, trainer):
            saved.append(trainer.global_step)
            super().save(trainer)

    fit(tmp_path, 9, checkpoint=Count(), callbacks=[Stop()], min_steps=6)
    assert saved
    assert min(saved) >= 4  # the first validation
    assert len([step for step in saved if step < 6]) <= 1


def test_a_run_that_a_callback_stops_has_its_last_step(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 5

    module = fit(tmp_path, 9, callbacks=[Stop()], limit_val_batches=0)
    assert module.global_step == held(tmp_path)["global_step"] == 5


def test_a_kill_loses_no_more_than_the_interval(tmp_path, monkeypatch):
    clock, saved = [0.0], []  # 7 seconds a step, 2 a checkpoint

    class Steps(Callback):
        def on_before_optimizer_step(self, trainer, *_):
            clock[0] += 7
            assert clock[0] - (saved[-1] if saved else 0) <= 30  # what a kill at this moment would lose

        def on_save_checkpoint(self, trainer, *_):
            saved.append(clock[0])
            clock[0] += 2

    monkeypatch.setattr("callbacks.last_checkpoint.time.monotonic", lambda: clock[0])
    fit(tmp_path, 20, [Steps()], LastCheckpoint(0.5), limit_val_batches=0)
    assert len(saved) == 7  # after step 4, then every third step, and the last
    with pytest.raises(ValueError, match="`every_minutes` must be positive"):
        LastCheckpoint(0.0)


def test_slow_checkpoints_take_a_third_of_the_time(tmp_path, monkeypatch):
    clock, saved = [0.0], []  # a second for a step, 20 for a checkpoint

    class Steps(Callback):
        def on_before_optimizer_step(self, trainer, *_):
            clock[0] += 1

        def on_save_checkpoint(self, trainer, *_):
            saved.append(clock[0])
            clock[0] += 20

    monkeypatch.setattr("callbacks.last_checkpoint.time.monotonic", lambda: clock[0])
    fit(tmp_path, 115, [Steps()], LastCheckpoint(0.5), limit_val_batches=0)
    assert saved == [30, 91, 152, 175]  # after 30 seconds, then more than three times 20 after the last, and at the end


def test_a_dry_run_saves_nothing(tmp_path):
    fit(tmp_path, 3, fast_dev_run=2)
    assert not (tmp_path / "checkpoints").exists()


def test_random_numbers_of_another_number_of_ranks_are_not_used(tmp_path):
    fit(tmp_path / "one", 2, limit_val_batches=0)
    path = tmp_path / "one" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["callbacks"]["LastCheckpoint"]["random_states"] *= 2
    torch.save(content, path)
    states = []

    class Look(Callback):
        def on_train_batch_start(self, *_):  # not before: checkpoints come after other callbacks
            states.append(torch.get_rng_state())

    class Set(Callback):
        def on_fit_start(self, *_):
            torch.manual_seed(7)

    fit(tmp_path / "two", 3, [Set(), Look()], ckpt_path=path, limit_val_batches=0)
    assert not torch.equal(states[0], content["callbacks"]["LastCheckpoint"]["random_states"][0]["torch"])


def test_gradients_that_accumulate_are_not_lost(tmp_path):
    whole = fit(tmp_path / "whole", 6, accumulate_grad_batches=3, limit_val_batches=0)
    stop = [StopAt("on_train_batch_start", 2)]
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", 6, stop, LastCheckpoint(1e-9), accumulate_grad_batches=3, limit_val_batches=0)
    assert held(tmp_path / "cut")["global_step"] >= 1
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert_same(whole, fit(tmp_path / "on", 6, accumulate_grad_batches=3, limit_val_batches=0, ckpt_path=last))


CUTS = {
    "in a step": ("on_before_optimizer_step", 6),
    "before a validation": ("on_validation_start", 4),
    "in a validation": ("on_validation_batch_end", 8),
    "after a validation": ("on_validation_end", 8),
    "before the last validation": ("on_validation_start", 12),
    "in the last validation": ("on_validation_batch_end", 12),
    "after the last validation": ("on_train_end", 12),
}
EPOCHS = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize(
    ("callbacks", "options"),
    [((), {}), ((), EPOCHS), ((EMAWeightAveraging,), {})],
    ids=["by steps", "by epochs", "EMA"],
)
def test_a_run_cut_anywhere_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, case, callbacks, options):
    hook, step = CUTS[case]
    monkeypatch.setattr("datamodules.modular_arithmetic.EPOCH", 4)
    expected, found, cut = Validations(), Validations(), Validations()
    whole = fit(tmp_path / "whole", 12, [make() for make in callbacks] + [expected], make=Dropped, **options)
    parts = [make() for make in callbacks] + [cut, StopAt(hook, step)]
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", 12, parts, make=Dropped, **options)
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    parts = [make() for make in callbacks] + [found]
    resumed = fit(tmp_path / "on", 12, parts, make=Dropped, ckpt_path=last, **options)
    assert resumed.trainer.max_steps == 12
    if case != "after the last validation":  # then nothing is left to do
        assert_same(whole, resumed)
        assert expected.seen[-1] == found.seen[-1]
    assert sorted({*cut.seen, *found.seen}) == expected.seen
    expected_state, found_state = held(tmp_path / "whole"), held(tmp_path / "on")
    assert found_state["global_step"] == 12
    for name, value in expected_state["state_dict"].items():
        assert torch.equal(value, found_state["state_dict"][name]), name


def test_a_run_resumed_at_its_end_leaves_its_checkpoint(tmp_path):
    fit(tmp_path / "first", 6)
    source, copy = (tmp_path / name / "checkpoints" / "last.ckpt" for name in ("first", "again"))
    callback = LastCheckpoint()
    fit(tmp_path / "again", 6, checkpoint=callback, ckpt_path=source)
    assert callback.nothing_trained
    assert copy.read_bytes() == source.read_bytes()
    shutil.rmtree(tmp_path / "first")
    longer = LastCheckpoint()
    fit(tmp_path / "longer", 7, checkpoint=longer, ckpt_path=copy)
    assert not longer.nothing_trained
    assert held(tmp_path / "longer")["global_step"] == 7


def test_a_second_fit_is_no_resume(tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path, 4, [StopAt("on_validation_start", 4)])
    again, last = LastCheckpoint(), tmp_path / "checkpoints" / "last.ckpt"
    fit(tmp_path / "on", 4, checkpoint=again, ckpt_path=last)
    options = {"make": Dropped, "limit_val_batches": 0}
    assert_same(fit(tmp_path / "alone", 4, **options), fit(tmp_path / "new", 4, checkpoint=again, **options))
    assert held(tmp_path / "new")["global_step"] == 4


class TwoOptimizers(Separability):
    """Counts two steps for each batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]


def test_it_has_the_last_step_also_where_a_step_jumps_over_it(tmp_path):
    module = fit(tmp_path, 5, make=TwoOptimizers, limit_val_batches=0)
    assert module.global_step == held(tmp_path)["global_step"] == 6
