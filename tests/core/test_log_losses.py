"""Losses of training steps: in the loggers at their interval, and in `callback_metrics` after every step."""

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from toy_logger import Kept

from callbacks import RunRecord
from lightning_modules.core.reporting import log_losses


class Numbered(BoringModel):
    """Its loss in batch i is i."""

    own = True

    def training_step(self, batch, batch_idx):
        loss = 0 * super().training_step(batch, batch_idx)["loss"] + batch_idx
        if self.own:
            log_losses(self, {"loss": loss, "half": loss / 2})
        else:
            self.log_dict({"train/loss": loss, "train/half": loss / 2})
        return loss


class Each(Callback):
    """Notes what callbacks see after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        for kept in (trainer.callback_metrics, trainer.logged_metrics):
            self.seen.append({name: value.item() for name, value in kept.items()})


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 2])
def test_loggers_and_callbacks_get_what_lightning_gives_them(tmp_path, every, accumulate):
    found = []
    for own in (False, True):
        model, logger, each = Numbered(), Kept(), Each()
        model.own = own
        Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=logger,
            callbacks=[each],
            max_epochs=1,
            limit_train_batches=12,
            limit_val_batches=0,
            log_every_n_steps=every,
            accumulate_grad_batches=accumulate,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model)
        found.append((logger.rows, each.seen))
    assert found[0] == found[1]
    assert len([row for row in logger.rows if "train/loss" in row[1]]) == 12 // every // accumulate
    assert found[1][1][-1] == {"train/loss": 11.0, "train/half": 5.5}


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize(("stop", "steps"), [(3, [1, 2]), (4, [1, 3]), (None, [1, 3])])
def test_loggers_get_the_losses_of_the_step_at_which_a_run_is_stopped(tmp_path, hook, stop, steps):
    class Stopping(Callback):
        pass

    def ask(self, trainer, *args):
        trainer.should_stop |= trainer.global_step == stop

    setattr(Stopping, hook, ask)
    model, logger = Numbered(), Kept()
    Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=logger,
        callbacks=[RunRecord(), Stopping()],
        max_steps=5,
        limit_train_batches=1 if hook == "on_train_epoch_end" else 9,
        limit_val_batches=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model)
    rows = [(row[0], row[1]["train/loss"]) for row in logger.rows if "train/loss" in row[1]]
    assert [step for step, _ in rows] == steps
    if hook != "on_train_epoch_end":
        assert [loss for _, loss in rows] == steps  # the loss of a batch is its number


def test_a_step_without_a_trainer_logs_nothing():
    log_losses(BoringModel(), {"loss": torch.tensor(1.0)})
