"""Curriculum: phases advance on held-out accuracy alone, and a resumed run has the batches of the whole one."""

import warnings

import pytest
import torch
from conftest import QUIET
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import Curriculum, LastCheckpoint
from datamodules import Mixture, NeedleGym, StateTracking, TextCorpus

PHASES = [{"needles": 1, "seq_len": 8}, {"needles": 2, "seq_len": 12}, {}]
REACHED = (8, 24)  # steps from which a validation is good enough; 24 is also the end of an epoch


class Learner(LightningModule):
    """Logs an accuracy that depends on the step, and records training batches and shapes of validation rows."""

    def __init__(self, logged="validation/accuracy"):
        super().__init__()
        self.weight, self.seen, self.held_out = torch.nn.Parameter(torch.zeros(())), [], []
        self.logged = logged

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["tokens"])
        return (self.weight - batch["tokens"].float().mean()).square()

    def validation_step(self, batch, batch_idx):
        self.held_out.append((self.global_step, *batch["tokens"].shape))
        # Accuracy falls with each phase, as a harder phase would make it
        reached = sum(self.global_step >= step for step in REACHED)
        self.log(self.logged, float(reached * 4 >= batch["tokens"].shape[1] - 4), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_data(**options):
    sizes = {"batch_size": 4, "validation_size": 6, "epoch_size": 48, "seed": 2}
    return NeedleGym(**{"needles": 3, "seq_len": 16, "vocab_size": 20} | sizes | options)


def fit(folder, steps=36, phases=PHASES, data=None, module=None, callbacks=(), ckpt_path=None, **more):
    module, curriculum = module or Learner(), Curriculum(phases, threshold=0.9)
    options = QUIET | {"enable_checkpointing": True, "val_check_interval": 4, "check_val_every_n_epoch": None} | more
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        callbacks=[curriculum, LastCheckpoint(), *callbacks],
        **options,
    )
    trainer.fit(module, data or make_data(), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer.callback_metrics


def saved(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["Curriculum"]


def lengths(batches):
    return [tokens.shape[1] for tokens in batches]


def test_phases_advance_on_held_out_accuracy_and_a_resumed_run_goes_on(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, metrics = fit(tmp_path, callbacks=[keep])
    assert lengths(whole.seen) == [8] * 8 + [12] * 16 + [16] * 12
    assert whole.held_out[-7:] == [(step, 6, 12 if step <= 24 else 16) for step in range(12, 37, 4)]
    assert {name: metrics[f"curriculum/{name}"] for name in ("phase", "step_0", "step_1", "step_2")} == {
        "phase": 2,
        "step_0": 0,
        "step_1": 8,
        "step_2": 24,
    }
    assert saved(tmp_path)["starts"] == [0, 8, 24]
    for step in (5, 8, 14, 24, 25):  # within phases, and before the validations that advance
        resumed, again = fit(tmp_path, callbacks=[keep], ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(*pair) for pair in zip(resumed.seen, whole.seen[step:], strict=True))
        assert torch.equal(resumed.weight, whole.weight)
        assert again["curriculum/step_2"] == 24


def test_phases_of_a_mixture(tmp_path):
    sizes = {"batch_size": 4, "validation_size": 6, "seed": 0}
    data = Mixture([make_data(), StateTracking(train_len=8, test_len=8, **sizes)], weights=[1, 0])
    module, _ = fit(tmp_path, phases=[{"needles": 1, "seq_len": 8}, {"weights": [0, 1], "train_len": 5}], data=data)
    assert lengths(module.seen) == [8] * 8 + [5] * 28
    assert module.held_out[-1] == (36, 6, 16)


@pytest.mark.parametrize(
    ("phases", "reason"),
    [
        ([{}, {"needels": 2}], r"Curriculum.phases\[1\]: NeedleGym has no knob 'needels'; the nearest is 'needles'"),
        ([{"vocab_size": 9}], r"Curriculum.phases\[0\]: NeedleGym has no knob 'vocab_size'"),
        ([{"needles": "many"}], r"Curriculum.phases\[0\]: needles must be of type int, not 'many'"),
        ([{"needles": None}], r"Curriculum.phases\[0\]: needles must be of type int, not None"),
        ([{"task": "mqr"}], r"Curriculum.phases\[0\]: task must be one of 'mqar', .*, not 'mqr'"),
        ([{"needles": 7}], r"Curriculum.phases\[0\]: data.seq_len 16 is too short"),
        ([{"seq_len": 32}], r"Curriculum.phases\[0\]: its seq_len is 32, and the data has 16"),
        ([], r"Curriculum.phases is empty"),
    ],
)
def test_wrong_phases(tmp_path, phases, reason):
    with pytest.raises(ValueError, match=reason):
        fit(tmp_path, phases=phases)


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"TextCorpus has no knobs; Mixture, NeedleGym, StateTracking have"):
        fit(tmp_path, data=TextCorpus(seq_len=8))
    with pytest.raises(ValueError, match=r"Learner logs no validation/accuracy"):
        fit(tmp_path, module=Learner("validation/loss"))
    with pytest.raises(ValueError, match=r"overfit_batches repeats the first batches"):
        fit(tmp_path, overfit_batches=1)
    with pytest.raises(ValueError, match=r"Curriculum.threshold must be at most 1, not 95"):
        Curriculum(PHASES, threshold=95)
    with pytest.raises(ValueError, match=r"limit_val_batches is 0, and without validations no phase could follow"):
        fit(tmp_path, limit_val_batches=0)
    fit(tmp_path, steps=12, callbacks=[ModelCheckpoint(tmp_path, filename="last")])
    with pytest.raises(ValueError, match=r"the checkpoint is in phase 1, after .*, and the config begins with"):
        fit(tmp_path, phases=[PHASES[0], {}], ckpt_path=tmp_path / "last.ckpt")


def test_an_accuracy_at_the_threshold_counts_in_training_alone(tmp_path):
    class Perfect(Learner):
        def validation_step(self, batch, batch_idx):
            self.log("validation/accuracy", 1.0)

    options = QUIET | {"val_check_interval": 4, "logger": False, "num_sanity_val_steps": 1}
    curriculum = Curriculum(PHASES, threshold=1.0)
    trainer = Trainer(accelerator="cpu", max_steps=4, callbacks=[curriculum], **options)
    trainer.fit(module := Perfect(), data := make_data())
    trainer.validate(module, data, verbose=False)
    assert curriculum.state_dict()["steps"] == [0, 4]


def test_a_phase_that_never_began_is_told(tmp_path):
    with pytest.warns(UserWarning, match="Curriculum: the training ended in phase 0 of 0 to 2"):
        fit(tmp_path, steps=8, val_check_interval=12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path / "whole")
    assert not any("the training ended" in str(warning.message) for warning in caught)


def test_a_second_fit_begins_with_the_first_phase(tmp_path):
    curriculum, options = Curriculum(PHASES, threshold=0.9), QUIET | {"val_check_interval": 4, "logger": False}
    for steps, phase in ((12, 1), (4, 0)):
        trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=[curriculum], **options)
        trainer.fit(module := Learner(), make_data())
        assert trainer.callback_metrics["curriculum/phase"] == phase
    assert lengths(module.seen) == [8] * 4


def test_a_resumed_run_may_have_other_phases_to_come(tmp_path):
    fit(tmp_path, steps=12)
    phases = [*PHASES[:2], {"needles": 1, "seq_len": 10}]
    fit(tmp_path, steps=16, phases=phases, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert saved(tmp_path)["phases"] == phases


def test_a_test_of_a_checkpoint_needs_no_phases_of_its_run(tmp_path):
    class Tested(Learner):
        def test_step(self, batch, batch_idx):
            self.rows = batch["tokens"].shape

    fit(tmp_path, steps=12)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[Curriculum([{}])], **QUIET)
    module, last = Tested(), tmp_path / "checkpoints" / "last.ckpt"
    trainer.test(module, make_data(test_size=5), ckpt_path=last, verbose=False, weights_only=True)
    assert module.rows == (5, 16)
