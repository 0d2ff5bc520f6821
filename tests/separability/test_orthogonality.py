"""A penalty on streams that point where an anchor's do."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_separability import SIZES, streams, trainer

from callbacks import ActivationClamp
from datamodules.errors import UserError
from lightning_modules.separability import Orthogonality, Separability


def saved(path: Path, **options) -> str:
    """A checkpoint of an untrained model."""
    state = Separability(**SIZES | options).network.state_dict()
    torch.save({"state_dict": {f"network.{name}": value for name, value in state.items()}}, path)
    return str(path)


def anchored(tmp_path: Path, cosine_SBT: torch.Tensor, form: str) -> Orthogonality:
    """A penalty whose cosines are given."""
    anchor = Orthogonality(saved(tmp_path / "anchor.ckpt"), form=form)
    anchor.train_residual = lambda tokens: None
    anchor.cosine = lambda x_SBTD, anchor_SBTD: cosine_SBT
    return anchor


def test_a_penalty_turns_the_stream_away_from_the_anchor(tmp_path):
    for ensemble in (1, 2):
        anchor = Separability(**SIZES, seed=0, ensemble=ensemble)
        kept = trainer(tmp_path, 1)
        kept.fit(anchor, datamodule=streams())
        path = str(tmp_path / f"anchor-{ensemble}.ckpt")
        kept.save_checkpoint(path)
        cosines = {}
        for weight in (0.0, 10.0):
            module = Separability(**SIZES, seed=0, ensemble=ensemble, start=path, schedule="constant",
                                  optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
                                  orthogonality=Orthogonality(path, weight))  # fmt: skip
            done = trainer(tmp_path, 60)
            done.fit(module, datamodule=streams())
            done.test(module, datamodule=streams(), verbose=False)
            cosines[weight] = module.members["test/anchor_cosine2"]
            assert not any("orthogonality" in name for name in module.state_dict())
        assert (cosines[10.0] < 0.3 * cosines[0.0]).all()


def test_a_constant_that_layer_norm_takes_away_turns_no_stream(tmp_path):
    x_SBTD = torch.randn(1, 2, 3, 16)
    for norm, same in (("layer", True), ("none", False)):
        other = Separability(**SIZES, seed=0, norm=norm)
        state = {f"network.{name}": value for name, value in other.network.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / f"{norm}.ckpt")
        anchor = Orthogonality(str(tmp_path / f"{norm}.ckpt"))
        anchor.load(other.network, 1)
        moved = anchor.cosine(x_SBTD + 50, x_SBTD)
        assert torch.allclose(moved, torch.ones(()), atol=1e-3) is same
    zero = anchor.cosine(torch.eye(16)[None, None, :1], torch.eye(16)[None, None, 1:2])
    assert zero.abs().max() < 1e-6


def test_the_mean_is_taken_over_features_at_each_position(tmp_path):
    other = Separability(**SIZES)
    anchor = Orthogonality(saved(tmp_path / "anchor.ckpt"))
    anchor.load(other.network, 1)
    x_SBTD, y_SBTD = torch.randn(2, 1, 2, 3, 16)
    normed = (torch.nn.functional.layer_norm(side, (16,)) for side in (x_SBTD, y_SBTD))
    expected = torch.nn.functional.cosine_similarity(*normed, dim=-1)
    offset_T1 = torch.tensor([[5.0], [-3.0], [40.0]])
    torch.testing.assert_close(anchor.cosine(x_SBTD + offset_T1, y_SBTD), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("form", "expected"), [("squared", [0.25, 0.5]), ("seed", [0.0, 0.5])])
def test_only_labelled_positions_count(tmp_path, form, expected):
    cosine_SBT = torch.tensor([[[0.5, -0.5, 1.0]], [[-1.0, 0.0, 1.0]]])
    labels_BT = torch.tensor([[3, 4, -100]])
    anchor = anchored(tmp_path, cosine_SBT, form)
    torch.testing.assert_close(anchor.penalty(None, None, labels_BT), torch.tensor(expected))
    assert anchor.penalty(None, None, torch.full((1, 3), -100)).tolist() == [0, 0]


def test_the_mean_of_the_ranks_is_the_mean_over_their_labelled_positions(tmp_path):
    module = Separability(**SIZES, orthogonality=anchored(tmp_path, torch.tensor([[[0.5, 1.0, 0.0]]]), "squared"))
    labels_BT = [torch.tensor([[3, -100, -100]]), torch.tensor([[-100, 3, 4]])]
    module._trainer = SimpleNamespace(world_size=2)
    module.all_gather = lambda _: torch.tensor([1.0, 2.0])  # labels of the ranks
    penalties = [module.penalties((None, None), {"tokens": None, "labels": own}) for own in labels_BT]
    (first_S,), (second_S,) = ((value_S for _, value_S in penalty.values()) for penalty in penalties)
    torch.testing.assert_close((first_S + second_S) / 2, torch.tensor([(0.25 + 1.0 + 0.0) / 3]))


def test_a_clamp_does_not_reach_the_anchor(tmp_path):
    module = Separability(**SIZES, seed=1, orthogonality=Orthogonality(saved(tmp_path / "anchor.ckpt", seed=0)))
    tokens_BT = torch.arange(12)[None]
    expected = Separability(**SIZES, seed=0).call(tokens_BT)[1]
    seen = []

    class Look(ActivationClamp):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append((pl_module.call(tokens_BT)[1].abs().max().item(), pl_module.orthogonality.residual(tokens_BT)))

    trainer(tmp_path, 1, callbacks=[Look("final_residual", "zero")]).fit(module, datamodule=streams())
    ((clamped, anchor_SBTD),) = seen
    assert clamped == 0
    assert torch.equal(anchor_SBTD, expected)


def test_a_weight_that_is_no_finite_number_of_at_least_zero_is_refused():
    for weight, reason in ((-1.0, "at least 0, not -1.0"), (math.inf, "a finite number, not inf")):
        with pytest.raises(UserError, match=rf"^model\.orthogonality\.weight must be {reason}"):
            Orthogonality("anchor.ckpt", weight)
