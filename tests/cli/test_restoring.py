"""What refuses its state in a checkpoint is named in one sentence; what is no fault of the checkpoint stays."""

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from cli.restoring import Restoring, explained
from datamodules.errors import UserError

SIZES = (
    "size mismatch for a.b: copying a param with shape torch.Size([3]) from checkpoint, "
    "the shape in current model is torch.Size([2])."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "--ckpt_path: a.ckpt cannot be restored: KeyError: 'x'"),
        (AttributeError("x"), "--ckpt_path: a.ckpt cannot be restored: AttributeError: x"),
        (TypeError("x"), "--ckpt_path: a.ckpt cannot be restored: TypeError: x"),
        (ValueError("x"), "--ckpt_path: a.ckpt cannot be restored: ValueError: x"),
        (ZeroDivisionError("y"), "--ckpt_path: a.ckpt cannot be restored: ZeroDivisionError: y"),
        (RuntimeError("z"), "--ckpt_path: a.ckpt cannot be restored: RuntimeError: z"),
        (
            RuntimeError(SIZES),
            "--ckpt_path: a.ckpt: the checkpoint does not fit the config: a.b is [3] there and [2] in",
        ),
    ],
)
def test_an_owner_that_refuses_its_state_is_one_sentence(error, said):
    with pytest.raises(UserError) as refused, explained("a.ckpt"):
        raise error
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    "error", [UserError("x"), torch.OutOfMemoryError("x"), RuntimeError("CUDA out of memory"), OSError("x")]
)
def test_other_errors_stay(error):
    with pytest.raises(type(error)) as raised, explained("a.ckpt"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("part", ["_restore_modules_and_callbacks", "restore_training_state"])
def test_lightning_reads_all_parts_with_an_explanation(monkeypatch, part):
    def refuse(self):
        raise KeyError("x")

    monkeypatch.setattr(_CheckpointConnector, part, refuse)
    with pytest.raises(UserError, match="cannot be restored: KeyError: 'x'"):
        getattr(Restoring(Trainer(accelerator="cpu", **QUIET)), part)()
