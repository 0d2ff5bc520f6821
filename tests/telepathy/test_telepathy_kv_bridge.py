"""KVBridge on the embedded pair: parity with the text, gradients, rows beside others, controls, resume, refusals."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules import WordProblems
from datamodules.problems import generate
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.telepathy import KVBridge, Telepathy
from lightning_modules.telepathy.kv_bridge import nearest

ALL = [1, 2, 3, 4]
NAMES = ("train/loss", "validation/loss")
SMALL_KV = partial(KVBridge, tokens_per_source=2, hidden=16, reach=2)


def to_itself(which: str) -> Telepathy:
    """A bridge with identity maps from a model to itself."""
    models = (Pretrained(str(ROOT / "assets" / "pair" / which)) for _ in range(2))
    bridge = partial(KVBridge, key_norm=False)
    module = Telepathy(*models, lambda source, target, _: bridge(source, target), ALL, output="none").eval()
    with torch.no_grad():
        for own in module.bridge.maps:
            torch.nn.init.eye_(own[-1].weight)
            torch.nn.init.zeros_(own[-1].bias)
        module.soft_tokens.scale.fill_(1.0)
    return module


@pytest.mark.parametrize("which", ["source", "target"])
@torch.no_grad()
def test_a_bridge_from_a_model_to_itself_gives_that_models_own_loss(problems, which):
    module = to_itself(which)
    batch = module.collate(problems, False)
    soft_BKD, mask_BK = module(batch), batch["soft_mask"]
    for rows, text_rows in (
        (batch["soft_rows"], batch["text_rows"]),
        (
            module.target.rows.soft([""] * 16, ["7 cups"] * 16),
            module.target.rows.text([p.question for p in problems], ["7 cups"] * 16),
        ),
    ):
        losses, text = module.target.losses(rows, soft_BKD, mask_BK), module.target.losses(text_rows)
        assert max(abs(a - b).max() for a, b in zip(losses, text, strict=True)) < 1e-4
    zero = module.target.losses(batch["soft_rows"], 0 * soft_BKD, mask_BK)
    assert np.concatenate(zero).mean() > np.concatenate(module.target.losses(batch["text_rows"])).mean() + 1
    assert module.target.answers(batch["soft_rows"], 60, soft_BKD, mask_BK) == module.target.answers(
        batch["text_rows"], 60
    )


def test_gradients_reach_every_map_and_nothing_else(telepathy, problems):
    module = telepathy(SMALL_KV, ALL, objectives={"lm": 1.0})
    batch = module.collate(problems, True)
    module.target.logits(batch["soft"], module(batch)).square().mean().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert set(grads) == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in grads} == {"bridge", "soft_tokens"}
    assert set(module.state_dict()) == set(grads)
    for layer, own in enumerate(module.bridge.maps):
        keys_and_values = own[-1].weight.grad.unflatten(0, (2, 2, -1)).abs().amax((2, 3))  # of each part
        assert (keys_and_values > 0).all(), layer
        assert (own[0].weight.grad != 0).all(), layer


@torch.no_grad()
def test_a_row_does_not_depend_on_the_rows_beside_it(telepathy, problems):
    module = telepathy(SMALL_KV, [1, 3], normalizer="layer_norm").eval()
    batch = module.collate(problems, False)
    soft_BKD, mask_BK = module(batch), batch["soft_mask"]
    assert soft_BKD.shape[-1] == 4 * 2 * 3 * 32 == module.target.width
    assert mask_BK.sum(1).tolist() == [2 * count for count in batch["source_mask"].sum(1).tolist()]
    assert (soft_BKD[~mask_BK] == 0).all()
    losses = module.target.losses(batch["soft_rows"], soft_BKD, mask_BK)
    answers = module.target.answers(batch["soft_rows"], 12, soft_BKD, mask_BK)
    # What stands behind the end of a row is not read
    noisy_BKD = torch.where(mask_BK[..., None], soft_BKD, 1e3)
    for index, again in enumerate(module.target.losses(batch["soft_rows"], noisy_BKD, mask_BK)):
        assert np.array_equal(again, losses[index])
    for index, problem in enumerate(problems):
        alone = module.collate([problem], False)
        soft_1KD, rows = module(alone), alone["soft_rows"]
        torch.testing.assert_close(soft_BKD[index][mask_BK[index]], soft_1KD[0], atol=1e-4, rtol=1e-4)
        assert losses[index] == pytest.approx(module.target.losses(rows, soft_1KD, alone["soft_mask"])[0], abs=1e-3)
        assert [answers[index]] == module.target.answers(rows, 12, soft_1KD, alone["soft_mask"])


def test_no_logit_depends_on_keys_and_values_that_come_after(telepathy, problems):
    module = telepathy(SMALL_KV, ALL)
    batch = module.collate(problems[:1], True)
    soft_BKD, packing = module(batch).detach().requires_grad_(), batch["soft"]
    column_T, size = packing.column_BT[0], int(batch["soft_mask"].sum())
    packing.predict_N = torch.arange(len(column_T))
    logits_NV = module.target.logits(packing, soft_BKD)
    first = int((column_T == size - 1).nonzero()) + 1  # the position behind the last soft token reads all of them
    (grad_BKD,) = torch.autograd.grad(logits_NV[first].square().sum(), soft_BKD, retain_graph=True)
    assert (grad_BKD.abs().amax(-1) > 0).all()
    (grad_BKD,) = torch.autograd.grad(logits_NV[int((column_T == 0).nonzero()) - 1].sum(), soft_BKD)
    assert (grad_BKD == 0).all()


@pytest.mark.parametrize(
    ("layers", "listed", "reach", "wanted"),
    [
        (4, 4, 1, [[0], [1], [2], [3]]),
        (4, 2, 1, [[0], [0], [1], [1]]),
        (3, 6, 2, [[0, 1], [2, 3], [4, 5]]),
        (4, 4, 4, [[0, 1, 2, 3]] * 4),
        (1, 3, 1, [[0]]),
    ],
)
def test_layers_of_different_numbers_are_matched_by_depth(layers, listed, reach, wanted):
    assert [nearest(layer, layers, listed, reach) for layer in range(layers)] == wanted


@pytest.mark.parametrize("reach", [1, 2, 4])
@torch.no_grad()
def test_a_target_layer_reads_all_its_source_layers_and_no_others(telepathy, problems, reach):
    module = telepathy(partial(KVBridge, reach=reach), ALL).eval()
    states_BSC, mask_BS = module.read(batch := module.collate(problems[:2], False)), batch["source_mask"]
    before_BKD = module.bridge(states_BSC, mask_BS)
    for layer in range(4):
        changed_BSC = states_BSC.clone()
        changed_BSC[..., 128 * layer : 128 * (layer + 1)] *= -1
        moved_D = (module.bridge(changed_BSC, mask_BS) - before_BKD).abs().amax((0, 1))
        readers = {reader for reader in range(4) if layer in nearest(reader, 4, 4, reach)}
        assert {index // 192 for index in moved_D.nonzero().flatten().tolist()} == readers


def test_it_trains_with_objectives_on_soft_tokens(telepathy, fit):
    objectives = dict.fromkeys(("lm", "kl_text", "readback", "first_tokens", "contrastive", "anchor"), 0.1)
    objectives |= dict.fromkeys(("reconstruction", "batch_diversity", "separation", "position_variance"), 0.1)
    module = telepathy(SMALL_KV, [2, 4], objectives=objectives, text_prefix=2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = fit(module, 3)
    for name in objectives:
        assert np.isfinite(trainer.callback_metrics[f"train/{name}"].item()), name
    assert all((value != before[name]).any() for name, value in module.state_dict().items())


def test_the_vectors_of_a_text_are_its_keys_and_values(telepathy, problems):
    """What the gate `embeddings` puts in and the objective `anchor` compares with answers as the text does."""
    module = telepathy(SMALL_KV, ALL)
    assert module.scale == 1.0
    tokens = module.target.rows.question_tokens([problem.question for problem in problems])
    mask_BK = torch.arange(max(map(len, tokens))) < torch.tensor([*map(len, tokens)])[:, None]
    tokens_BK = torch.tensor([row + [0] * (mask_BK.shape[1] - len(row)) for row in tokens])
    evaluated = module.collate(problems, False)
    losses = module.target.losses(evaluated["soft_rows"], module.target.vectors(tokens_BK), mask_BK)
    text = module.target.losses(evaluated["text_rows"])
    assert max(abs(a - b).max() for a, b in zip(losses, text, strict=True)) < 1e-4


def test_a_run_has_every_measure_and_control(run, workplace):
    sizes = ["--model.bridge.hidden", "16", "--model.text_prefix", "2", "--trainer.max_steps", "2"]
    done = run(
        "fit", "telepathy_v18", *sizes, "--trainer.default_root_dir", "mine", "--trainer.val_check_interval", "2"
    )
    metrics = json.loads(Path("mine/results.json").read_text())["metrics"]
    proportions = {f"test/{name}accuracy" for name in ("", "zero_", "shuffled_", "text_", "text_prefix_")}
    assert proportions <= set(done.model.intervals) & set(metrics)
    measures = {"ce_bridge", "ce_zero", "ce_shuffled", "ce_none", "cosine", "between_input_variance", "effective_rank"}
    assert {f"test/{name}" for name in measures | {"source_specificity", "retrieval", "soft_bits"}} <= set(metrics)
    batch = done.model.collate(done.datamodule.eval_problems["test"], False)
    assert metrics["test/soft_bits"] == pytest.approx(16 * 768 * batch["soft_mask"].sum().item() / 16)
    assert len(done.model.answer([generate(0, "test", 1).question], 5)) == 1


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, workplace):
    options = ["--data.epoch_size", 40, "--trainer.log_every_n_steps", 1, "--trainer.val_check_interval", 3]
    options += ["--model.bridge.hidden", 16, "--test_after_fit", "false", "--trainer.max_steps", 8]
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=4"]
    whole = run(
        "fit",
        "telepathy_v18",
        *options,
        *save,
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.default_root_dir",
        "whole",
    )
    (middle,) = Path("whole/checkpoints").glob("*step=4.ckpt")
    resumed = run("fit", "telepathy_v18", *options, "--trainer.default_root_dir", "resumed", "--ckpt_path", middle)
    expected, found = (
        {name: {e.step: e.value for e in EventAccumulator(folder).Reload().Scalars(name)} for name in NAMES}
        for folder in ("whole", "resumed")
    )
    for name in NAMES:
        assert {step: value for step, value in expected[name].items() if step >= 4} == found[name]
        assert found[name]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_training_is_the_same_with_keys_and_values_in_files(telepathy, fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        json.dumps({"question": p.question, "answer": p.answer}) for p in (generate(7, "train", i) for i in range(40))
    ]
    Path("train.jsonl").write_text("\n".join(rows))
    Path("test.jsonl").write_text("\n".join(rows[:6]))
    sizes = {name: size for name, size in SMALL.items() if name != "epoch_size"}
    losses = []
    for options in ({}, {"cache_source": True}, {"cache_source": True, "bridge": None}):
        module = telepathy(**{"bridge": SMALL_KV, "source_layer": ALL} | options)
        data = WordProblems("file", "train.jsonl", "test.jsonl", **sizes)
        losses.append(fit(module, 3, data).callback_metrics["train/loss"].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len({path.parent for path in Path("runs/source_states").rglob("*.safetensors")}) == 2  # states are no keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bridge": partial(KVBridge, reach=3), "source_layer": [1, 2]}, "model.bridge.reach must be at most 2, not 3"),
        (
            {"bridge": partial(KVBridge, tokens_per_source=0)},
            "model.bridge.tokens_per_source must be at least 1, not 0",
        ),
        ({"bridge": KVBridge, "objectives": {"lm": 1.0, "bag_of_words": 1.0}}, "compares embeddings, and a KVBridge"),
        ({"bridge": KVBridge, "objectives": {"flow": 1.0}}, "needs a FlowBridge as model.bridge, not a KVBridge"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(telepathy, options, message):
    with pytest.raises(ValueError, match=message):
        telepathy(**options)
