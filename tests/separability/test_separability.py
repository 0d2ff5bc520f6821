"""The separability line: ensembles are runs of their own, measures are what their formulas say."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import QUIET
from lightning import Trainer

from callbacks import ActivationClamp, ActivationReference, ParameterFreeze
from datamodules import InterleavedStreams, ModularArithmetic, WordProblems
from lightning_modules.separability import Separability

SIZES = {"vocab_size": 31, "seq_len": 12, "width": 16, "depth": 1, "heads": 2, "warmup_steps": 2}
MODULAR = {"vocab_size": 12, "seq_len": 3, "width": 16, "depth": 1, "heads": 2, "warmup_steps": 2}


def streams(**options) -> InterleavedStreams:
    common = {"vocab_size": 31, "seq_len": 12, "batch_size": 4, "eval_batch_size": 8}
    return InterleavedStreams(**common | {"validation_size": 8, "test_size": 16, "seed": 0} | options)


def trainer(folder: Path, steps: int, **options) -> Trainer:
    options = {"accelerator": "cpu", "max_steps": steps, "limit_val_batches": 0, "default_root_dir": folder} | options
    return Trainer(**QUIET | options)


class Losses(torch.nn.Module):
    """Keeps the members' losses of every step."""

    def __init__(self, module: Separability):
        super().__init__()
        self.seen = []
        step = module.training_step

        def kept(batch, batch_idx):
            loss = step(batch, batch_idx)
            self.seen.append(module.members["train/loss"].clone())
            return loss

        module.training_step = kept


@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("batch_size", [4, None], ids=["streams", "full batch"])
def test_an_ensemble_gives_the_losses_of_separate_runs(tmp_path, clip, batch_size):
    sizes = SIZES if batch_size else MODULAR
    data = streams if batch_size else lambda seed: ModularArithmetic(p=11, seed=seed)
    together = Separability(**sizes, ensemble=3, seed=5)
    losses = Losses(together)
    trainer(tmp_path, 20, gradient_clip_val=clip).fit(together, datamodule=data(seed=5))
    for member in range(3):
        alone = Separability(**sizes, seed=5 + member)
        own = Losses(alone)
        trainer(tmp_path, 20, gradient_clip_val=clip).fit(alone, datamodule=data(seed=5 + member))
        assert len(own.seen) == 20
        expected = torch.cat(own.seen)
        torch.testing.assert_close(torch.stack(losses.seen)[:, member], expected, rtol=1e-4, atol=1e-5)
        assert expected[-1] != expected[0]


def test_members_are_measured_and_saved_as_ordinary_models(tmp_path):
    together = Separability(**SIZES, ensemble=2, seed=3, save_members=True)
    done = trainer(tmp_path, 10)
    done.fit(together, datamodule=streams())
    done.test(together, datamodule=streams(), verbose=False)
    for member in range(2):
        alone = Separability(**SIZES, seed=99)
        checkpoint = tmp_path / "members" / f"{3 + member}.ckpt"
        measured = trainer(tmp_path, 1).test(alone, datamodule=streams(), ckpt_path=checkpoint, verbose=False)[0]
        for name in ("accuracy", "margin", "loss", "a_act", "a_projection", "sigma2", "a_signal", "position_overlap"):
            given = together.members[f"test/{name}"][member].item()
            assert measured[f"test/{name}"] == pytest.approx(given, rel=1e-4), name
    assert together.members["test/a_act"][0] != together.members["test/a_act"][1]


def test_what_the_task_lets_accuracy_be_is_told_beside_it(tmp_path):
    module, data = Separability(**SIZES, ensemble=2), streams()
    (measured,) = trainer(tmp_path, 1).test(module, datamodule=data, verbose=False)
    assert measured["test/chance"] == pytest.approx(data.chance)
    assert measured["test/ceiling"] == data.ceiling == 1
    assert module.members["test/ceiling"].tolist() == [1, 1]


def test_frozen_heads_stay_bit_identical_with_weight_decay(tmp_path):
    for ensemble in (1, 2):
        optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5)  # noqa: E731
        module = Separability(**SIZES, ensemble=ensemble, optimizer=optimizer, schedule="constant")
        before = {name: value.clone() for name, value in module.network.named_parameters()}
        freeze = ParameterFreeze(["*.attn.q_proj.0", "*.attn.k_proj.0"])
        trainer(tmp_path, 200, callbacks=[freeze]).fit(module, datamodule=streams())
        for name, value in module.network.named_parameters():
            frozen = name.endswith(("q_proj.0", "k_proj.0"))
            assert torch.equal(value, before[name]) is frozen, name


def test_a_run_is_the_same_bit_for_bit_under_its_seed(tmp_path):
    states = []
    for _ in range(2):
        module = Separability(**SIZES, ensemble=2, seed=1)
        trainer(tmp_path, 10).fit(module, datamodule=streams())
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("mode", ["naive", "mean_preserving"])
def test_a_clamp_holds_each_member_to_its_own_control(tmp_path, mode):
    control = Separability(**SIZES, ensemble=3, seed=0)
    reference = ActivationReference("final_residual", path=str(tmp_path / "reference.safetensors"))
    done = trainer(tmp_path, 5, callbacks=[reference])
    done.fit(control, datamodule=streams())
    done.test(control, datamodule=streams(eval_batch_size=16), verbose=False)
    # Other weights, so that there is something to hold; one batch, so that the clamp's statistics are the measure's
    clamped = Separability(**SIZES, ensemble=3, seed=50)
    clamp = ActivationClamp("final_residual", mode, reference=reference.path)
    trainer(tmp_path, 5, callbacks=[clamp]).test(clamped, datamodule=streams(eval_batch_size=16), verbose=False)
    name = "test/a_act" if mode == "naive" else "test/sigma2"
    torch.testing.assert_close(clamped.members[name], control.members[name], rtol=1e-5, atol=1e-5)
    free = Separability(**SIZES, ensemble=3, seed=50)
    trainer(tmp_path, 5).test(free, datamodule=streams(eval_batch_size=16), verbose=False)
    assert not torch.isclose(free.members[name], control.members[name], rtol=1e-2).any()


@pytest.mark.parametrize("mode", ["random_direction", "identity", "shuffle", "mean"])
def test_every_clamp_runs_in_an_ensemble(tmp_path, mode):
    module = Separability(**SIZES, ensemble=2, seed=0)
    reference = str(tmp_path / "reference.safetensors")
    trainer(tmp_path, 1, callbacks=[ActivationReference("final_residual", path=reference)]).test(
        module, datamodule=streams(), verbose=False
    )
    free = module.members["test/margin"].clone()
    clamp = ActivationClamp("blocks.0.residual", mode, reference=reference if mode == "random_direction" else None)
    if mode == "random_direction":
        clamp = ActivationClamp("final_residual", mode, reference=reference)
    trainer(tmp_path, 1, callbacks=[clamp]).test(module, datamodule=streams(), verbose=False)
    assert torch.equal(module.members["test/margin"], free) is (mode == "identity")


def test_it_starts_where_a_checkpoint_ended(tmp_path):
    first = Separability(**SIZES, seed=0)
    done = trainer(tmp_path, 3)
    done.fit(first, datamodule=streams())
    done.save_checkpoint(tmp_path / "first.ckpt")
    start = str(tmp_path / "first.ckpt")
    module = Separability(**SIZES, seed=1, ensemble=2, start=start, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-30))
    trainer(tmp_path, 1).fit(module, datamodule=streams())
    for name, value in first.network.state_dict().items():
        own_S = module.network.state_dict()[name]
        assert torch.equal(own_S[0], value), name
        assert torch.equal(own_S[1], value), name
    untrained = Separability(**SIZES, seed=1, start=start)
    trainer(tmp_path, 1).test(untrained, datamodule=streams(), verbose=False)
    assert torch.equal(untrained.network.unembed.weight, first.network.unembed.weight)


def test_a_test_after_training_is_of_what_was_learnt(tmp_path):
    first = trainer(tmp_path, 1)
    first.fit(Separability(**SIZES, seed=0), datamodule=streams())
    first.save_checkpoint(tmp_path / "first.ckpt")
    for ckpt_path in (None, tmp_path / "first.ckpt"):
        module, done = Separability(**SIZES, seed=1, start=str(tmp_path / "first.ckpt")), trainer(tmp_path, 5)
        done.fit(module, datamodule=streams(), ckpt_path=ckpt_path)
        learnt = module.network.unembed.weight.clone()
        done.test(module, datamodule=streams(), verbose=False)
        assert torch.equal(module.network.unembed.weight, learnt)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3}, "heads must divide"),
        ({"ensemble": 0}, "ensemble must be at least 1"),
        ({"mlp_width": 0}, "mlp_width must be at least 1"),
        ({"vocab_size": 30}, "set --model.vocab_size 31"),
        ({"seq_len": 8}, "set --model.seq_len 12"),
        ({"start": "nowhere.ckpt"}, "there is no file nowhere.ckpt"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, options, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        trainer(tmp_path, 1).fit(Separability(**SIZES | options), datamodule=streams())


def test_data_and_precision_that_do_not_fit_are_told(tmp_path):
    with pytest.raises(ValueError, match="WordProblems gives problems in words, and Separability reads sequences"):
        trainer(tmp_path, 1).fit(Separability(**SIZES), datamodule=WordProblems())
    reader = Separability(**SIZES)
    reader.collate = list
    with pytest.raises(ValueError, match="InterleavedStreams gives sequences of tokens, and Separability reads"):
        trainer(tmp_path, 1).fit(reader, datamodule=streams())
    with pytest.raises(ValueError, match="bf16-true rounds small updates away, use bf16-mixed"):
        trainer(tmp_path, 1, precision="bf16-true").fit(Separability(**SIZES), datamodule=streams())
    trainer(tmp_path, 1, precision="64-true").fit(Separability(**SIZES), datamodule=streams())


def test_rows_without_a_label_have_no_loss(tmp_path):
    # Motifs longer than half of the few tokens of a stream never come back
    data = streams(rule="repeat", seq_len=6, batch_size=1)
    module = Separability(**SIZES, seed=0)
    losses = Losses(module)
    trainer(tmp_path, 20).fit(module, datamodule=data)
    seen = torch.cat(losses.seen)
    assert (seen == 0).any()
    assert (seen > 0).any()


def test_a_clamped_step_is_not_compiled(tmp_path):
    module = Separability(**SIZES, compile=True)
    clamp = ActivationClamp("final_residual", "identity")
    with pytest.warns(UserWarning, match="model.compile is ignored: a callback has a hook on final_residual"):
        trainer(tmp_path, 1, callbacks=[clamp]).fit(module, datamodule=streams())
    assert module._step_losses == module.losses


def test_a_compiled_step_gives_the_same_losses_and_is_not_disturbed_by_a_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traces, but needs no C compiler
    seen = {}
    for compiled in (False, True):
        module = Separability(**SIZES, seed=0, ensemble=2, compile=compiled)
        losses = Losses(module)
        reference = ActivationReference("final_residual", path=str(tmp_path / f"{compiled}.safetensors"))
        options = {"callbacks": [reference], "limit_val_batches": 1, "val_check_interval": 2}
        trainer(tmp_path, 4, **options).fit(module, datamodule=streams())
        seen[compiled] = torch.stack(losses.seen)
        assert (module._step_losses == module.losses) is not compiled
    torch.testing.assert_close(seen[True], seen[False], rtol=1e-4, atol=1e-5)


def test_predict_writes_what_the_model_says_and_where_it_looks(tmp_path):
    data = ModularArithmetic(p=11, inputs=["3 + 5", "1 + 1"])
    module = Separability(**MODULAR, seed=0)
    (written,) = trainer(tmp_path, 1).predict(module, datamodule=data)
    tokens = torch.tensor([[3, 5, 11], [1, 1, 11]])
    torch.testing.assert_close(written["logits"][0], module(tokens))
    loss = torch.nn.functional.cross_entropy(module(tokens)[:, 2], torch.tensor([8, 2]), reduction="none")
    torch.testing.assert_close(written["loss"][0, :, 2], loss)
    assert written["loss"][0, :, :2].isnan().all()
    folder = tmp_path / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == [
        "attention-0-0.png", "attention-0-1.png", "logits-0.safetensors", "positions-0.jsonl"
    ]  # fmt: skip
    rows = (folder / "positions-0.jsonl").read_text().splitlines()
    assert len(rows) == 6
    assert '"token": "=", "label": "8"' in rows[2]
