"""The Telepathy module: trained and frozen parameters, source states, causality, and learning."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from lightning.pytorch.callbacks import Callback

from datamodules import WordProblems
from datamodules.batches import FiniteBatches
from datamodules.problems import generate
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.telepathy import KVBridge, PerceiverBridge, TokenBridge
from lightning_modules.telepathy.frozen import Frozen

ALL = {"lm": 1.0, "batch_diversity": 0.1, "contrastive": 0.1, "kl_text": 0.1}
SOURCE = Pretrained(str(ROOT / "assets" / "pair" / "source"))
LAST = SOURCE.load_config().num_hidden_layers


class Watch(Callback):
    """Record at each training step the frozen modules that are not in eval mode."""

    def __init__(self):
        self.steps, self.wrong = 0, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        assert module.bridge.training
        self.steps += 1
        self.wrong += [
            name for f in (module.source, module.target) for name, m in f.model.named_modules() if m.training
        ]


def frozen_weights(module) -> dict[str, torch.Tensor]:
    parts = {"source": module.source.model, "target": module.target.model}
    return {f"{which}.{name}": value for which, part in parts.items() for name, value in part.state_dict().items()}


def test_only_the_bridge_and_the_scale_get_gradients(telepathy, problems):
    module = telepathy(PerceiverBridge, objectives={"lm": 1.0})
    batch = module.collate(problems, True)
    logits_NV = module.target.logits(batch["soft"], module(batch))
    logits_NV.square().mean().backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    expected = {
        f"{part}.{name}" for part in ("bridge", "soft_tokens") for name, _ in getattr(module, part).named_parameters()
    }
    assert trained == expected == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(module.state_dict()) == expected


@pytest.mark.parametrize("bridge", [PerceiverBridge, TokenBridge, KVBridge])
def test_frozen_models_stay_bit_identical_and_in_eval_mode(telepathy, fit, bridge):
    module, watch = telepathy(bridge, objectives=ALL), Watch()
    before = {name: value.clone() for name, value in frozen_weights(module).items()}
    bridge_before = [parameter.clone() for parameter in module.bridge.parameters()]
    fit(module, 3, callbacks=[watch], limit_val_batches=1, val_check_interval=2)
    assert (watch.steps, watch.wrong) == (3, [])
    after = frozen_weights(module)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    changed = [not torch.equal(a, b) for a, b in zip(bridge_before, module.bridge.parameters(), strict=True)]
    assert sum(changed) > len(changed) // 2
    module.train()
    assert not any(m.training for f in (module.source, module.target) for m in f.model.modules())


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, LAST - 1, LAST, [1, 3], [3, 2, LAST]])
def test_what_is_read_is_the_hidden_states_of_the_whole_model(telepathy, problems, layers):
    module, whole = telepathy(source_layer=layers), SOURCE.load_causal_lm()
    listed = [layers] if isinstance(layers, int) else layers
    names = [name for name, _ in module.source.named_parameters()]
    assert len({name.split("layers.")[1].split(".")[0] for name in names if "layers." in name}) == max(listed)
    assert not any("lm_head" in name for name in names)
    batch = module.collate(problems, True)
    states_BSC = module.read(batch)
    assert states_BSC.shape == (*batch["source_mask"].shape, whole.config.hidden_size * len(listed))
    tokenizer = module.source.tokenizer
    for problem, states_SC, mask_S in zip(problems, states_BSC, batch["source_mask"], strict=True):
        head = tokenizer("Question:", add_special_tokens=False)["input_ids"]
        body = tokenizer(f" {problem.question}", add_special_tokens=False)["input_ids"]
        tokens_BT = torch.tensor([[tokenizer.bos_token_id, *head, *body]])
        states = whole(tokens_BT, output_hidden_states=True).hidden_states
        wanted_SC = torch.cat([states[layer][0, 1 + len(head) :] for layer in listed], dim=-1)
        torch.testing.assert_close(states_SC[mask_S], wanted_SC, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [99, [1, LAST + 1]])
def test_a_layer_that_the_source_does_not_have(telepathy, layers):
    most = layers if isinstance(layers, int) else layers[-1]
    with pytest.raises(ValueError, match=rf"source_layer {most} does not exist: '.*source' has layers 1 to {LAST}$"):
        telepathy(source_layer=layers)


@pytest.mark.parametrize("layers", [0, [], [2, 0], -1])
def test_a_layer_that_no_model_has(telepathy, layers):
    with pytest.raises(ValueError, match="they count from 1"):
        telepathy(source_layer=layers)


def test_no_logit_depends_on_soft_tokens_that_come_after(telepathy, problems):
    module = telepathy()
    batch = module.collate(problems[:1], True)
    soft_BKD, packing = module(batch).detach().requires_grad_(), batch["soft"]
    column_T, size = packing.column_BT[0], int(batch["soft_mask"].sum())
    packing.predict_N = torch.arange(len(column_T))
    logits_NV = module.target.logits(packing, soft_BKD)
    for k in (0, size // 2, size - 2):
        t = int((column_T == k).nonzero())
        (grad_BKD,) = torch.autograd.grad(logits_NV[t].square().sum(), soft_BKD, retain_graph=True)
        assert (grad_BKD[:, k + 1 :] == 0).all()
        assert (grad_BKD[:, : k + 1].abs().amax(dim=-1) > 0).all()


def test_no_state_depends_on_source_tokens_that_come_after(telepathy, problems):
    module = telepathy(source_layer=3)
    batch, embeds = module.collate(problems[:2], True), []
    table = module.source.model.model.get_input_embeddings()

    def watch(module, args, output):
        embeds.append(output.detach().requires_grad_())
        return embeds[0]

    handle = table.register_forward_hook(watch)
    states_BTC = module.source.model(batch["source"], batch["source_real"])
    handle.remove()
    assert not module.source.model.is_bidirectional
    for t in (0, 9, 20):
        (grad_BTD,) = torch.autograd.grad(states_BTC[:, t].square().sum(), embeds[0], retain_graph=True)
        assert (grad_BTD[:, t + 1 :] == 0).all()
        assert (grad_BTD[:, : t + 1].abs().amax(dim=(0, 2)) > 0).all()


@torch.no_grad()
def test_soft_tokens_of_a_sample_do_not_depend_on_its_batch(telepathy, problems):
    for bridge in (PerceiverBridge, partial(TokenBridge, hidden=64)):
        module = telepathy(bridge, source_layer=[1, 2], normalizer="layer_norm").eval()
        batch = module.collate(problems, False)
        soft_BKD = module(batch)
        losses = module.target.losses(batch["soft_rows"], soft_BKD, batch["soft_mask"])
        for i, problem in enumerate(problems):
            alone = module.collate([problem], False)
            soft_1KD = module(alone)
            alone_KD = soft_1KD[0][alone["soft_mask"][0]]
            torch.testing.assert_close(soft_BKD[i][batch["soft_mask"][i]], alone_KD, atol=1e-4, rtol=1e-4)
            (losses_alone,) = module.target.losses(alone["soft_rows"], soft_1KD, alone["soft_mask"])
            assert losses[i] == pytest.approx(losses_alone, abs=1e-3)


@torch.no_grad()
def test_soft_tokens_start_at_the_scale_of_the_embeddings(telepathy, problems):
    module = telepathy()
    batch = module.collate(problems, False)
    rms = module(batch)[batch["soft_mask"]].square().mean(-1).sqrt()
    scale = module.target.embedding.weight.square().mean().sqrt()
    assert module.target.scale() == pytest.approx(scale.item(), rel=1e-5)
    torch.testing.assert_close(rms, scale.expand_as(rms))


@torch.no_grad()
def test_the_bridge_of_the_notes_reads_states_at_embedding_scale_without_norm(telepathy, problems, fit):
    module = telepathy(PerceiverBridge, reproduce_flaws=True)
    fit(module, 1)
    assert type(module.bridge.norm) is torch.nn.Identity
    batch = module.collate(problems, False)
    states_NC = module.normalizer(module.read(batch))[batch["source_mask"]]
    assert states_NC.square().mean().sqrt().item() == pytest.approx(0.003, rel=0.1)  # as the notes' target has it
    for sound in (telepathy(PerceiverBridge), telepathy(PerceiverBridge, reproduce_flaws=["bos_behind"])):
        assert not isinstance(sound.bridge.norm, torch.nn.Identity)
        assert isinstance(sound.normalizer, torch.nn.Identity)
    assert type(telepathy(PerceiverBridge, reproduce_flaws=["key_scale"]).bridge.norm) is torch.nn.Identity


def test_problems_are_learned_by_heart(telepathy, problems, fit):
    optimizer, problems = partial(torch.optim.AdamW, lr=6e-3), problems[:6]
    module = telepathy(partial(TokenBridge, hidden=512), optimizer=optimizer, warmup_steps=5, max_new_tokens=100)
    data = WordProblems(**SMALL | {"batch_size": 6, "epoch_size": 6})
    data.train_dataloader = lambda: data._loader(
        FiniteBatches(problems, 6, lambda p: len(p.question), 0, True), data._collate(training=True)
    )
    trainer = fit(module, 50, data, gradient_clip_val=1.0)
    assert trainer.callback_metrics["train/loss"].item() < 0.1
    samples = module.eval().sample_eval(module.collate(problems, False))
    assert [sample.output for sample in samples] == [problem.answer for problem in problems]
    assert all(value == 1 for sample in samples for value in sample.scores.values())


def test_a_text_prefix_learns_and_does_not_change_the_course_of_the_bridge(telepathy, fit):
    modules = [telepathy(text_prefix=count, optimizer=partial(torch.optim.AdamW, lr=1e-2)) for count in (0, 4)]
    start = modules[1].text_prefix.vectors_KD.detach().clone()
    clipped = [fit(module, 4, gradient_clip_val=0.05).callback_metrics for module in modules]
    assert clipped[0]["train/loss"] == clipped[1]["train/loss"]
    for name, value in modules[0].state_dict().items():
        assert torch.equal(value, modules[1].state_dict()[name]), name
    assert (modules[1].text_prefix.vectors_KD != start).all()
    assert set(modules[1].state_dict()) - set(modules[0].state_dict()) == {"text_prefix.vectors_KD"}


@pytest.mark.parametrize(
    ("algorithm", "precision"), [("norm", "32-true"), ("value", "32-true"), ("value", "bf16-mixed"), (None, "32-true")]
)
def test_a_bridge_and_its_text_prefix_are_clipped_apart(telepathy, fit, algorithm, precision):
    optimizer = partial(torch.optim.SGD, lr=1e3)
    module = telepathy(text_prefix=4, optimizer=optimizer, warmup_steps=0, schedule="constant")
    start = {name: value.clone() for name, value in module.state_dict().items()}
    clip = {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": algorithm} if algorithm else {}
    fit(module, 1, precision=precision, **clip)
    moved = {name: (value - start[name]).flatten() for name, value in module.state_dict().items()}
    for moved_F in (moved.pop("text_prefix.vectors_KD"), torch.cat([*moved.values()])):
        largest, length = moved_F.abs().max().item(), moved_F.norm().item()
        assert {"norm": length, "value": largest}.get(algorithm, 1e-2) == pytest.approx(1e-2, rel=1e-2)
        assert (length > 2e-2) == (algorithm != "norm")


def test_a_fused_optimizer_is_clipped_in_bf16_as_another_one(telepathy, fit):
    start, moved = telepathy().state_dict(), []
    for fused in (False, True):
        module = telepathy(optimizer=partial(torch.optim.SGD, lr=1.0, fused=fused), warmup_steps=0, schedule="constant")
        fit(module, 1, gradient_clip_val=0.05, precision="bf16-mixed")
        moved.append({name: value - start[name] for name, value in module.state_dict().items()})
    length = sum(value.square().sum() for value in moved[1].values()).sqrt().item()
    assert length == pytest.approx(0.05, rel=1e-3)
    for name, value in moved[0].items():
        torch.testing.assert_close(value, moved[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_do_not_fit_are_told(telepathy, fit, precision):
    with pytest.raises(ValueError, match=f"trainer.precision: {precision} .* 32-true"):
        fit(telepathy(), 1, precision=precision)


def test_a_target_that_does_not_answer_soft_tokens_is_found_before_training(telepathy, fit):
    module = telepathy()
    module.target.model.register_forward_hook(lambda model, args, output: output.logits.detach_())
    with pytest.raises(ValueError, match=r"model.target: '.*target' does not answer soft tokens: "):
        fit(module, 1)


def test_the_length_limit_is_that_of_the_longest_answer(telepathy, fit):
    module, data = telepathy(max_new_tokens=None), WordProblems(**SMALL)
    fit(module, 1, data)
    answers = [f" {problem.answer}" for part in data.eval_problems.values() for problem in part]
    longest = max(len(module.target.tokenizer(answer)["input_ids"]) for answer in answers)
    assert module.answer_limit == longest + 1


def test_frozen_models_are_outside_state_dicts_and_shared_by_copies():
    frozen = Frozen(torch.nn.Linear(2, 2))
    whole = torch.nn.ModuleDict({"inner": torch.nn.ModuleDict({"frozen": frozen}), "own": torch.nn.Linear(2, 2)})
    assert set(whole.state_dict()) == {"own.weight", "own.bias"}
    averaged = torch.optim.swa_utils.AveragedModel(whole)
    assert averaged.module["inner"]["frozen"] is frozen
    assert averaged.module["own"] is not whole["own"]
    assert set(averaged.state_dict()) == {"n_averaged", "module.own.weight", "module.own.bias"}
    weight = frozen.model.weight.clone()
    averaged.load_state_dict(averaged.state_dict())  # strictly, as EMAWeightAveraging does at a resume
    whole.load_state_dict(whole.state_dict())
    assert torch.equal(frozen.model.weight, weight)
    with pytest.raises(RuntimeError, match=r"own\.bias"):
        whole.load_state_dict({"own.weight": whole["own"].weight})


def test_predict_writes_every_answer_in_its_order(run, workplace):
    run("predict", "telepathy_v16", "--trainer.default_root_dir", "mine")
    rows = [json.loads(line) for line in Path("mine/samples/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {"prompt", "reference", "output"} <= set(rows[0])
    assert sorted(row["prompt"] for row in rows) == sorted(generate(0, "test", i).question for i in range(16))
