"""TextMonitor, BitsByPosition, PhaseMonitor and GradientRatio on a small phase model and a text."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import QUIET
from lightning import Callback, Trainer

from callbacks import ActivationNoise, BitsByPosition, GradientRatio, PhaseMonitor, TextMonitor
from callbacks.bits_by_position import bits_by_position
from callbacks.gradient_ratio import mean_square
from datamodules import NeedleGym, TextCorpus
from datamodules.errors import UserError
from lightning_modules.core.diversity import distinct_n
from lightning_modules.core.repetition import repetition_rate
from lightning_modules.phase import Phase
from lightning_modules.separability import Separability

SIZES = {"vocab_size": 256, "seq_len": 16, "width": 16, "heads": 2, "seed": 0, "warmup_steps": 1}


def text(**options) -> TextCorpus:
    sizes = {"max_size": 9000, "seq_len": 16, "batch_size": 4, "validation_size": 4, "test_size": 4, "seed": 0}
    return TextCorpus(**sizes | options)


def fit(
    folder: Path, *callbacks, module=None, data=None, steps: int = 4, flags=None, **options
) -> tuple[Phase, Trainer]:
    module = module or Phase(**SIZES | {"pattern": "PP"} | options)
    torch.manual_seed(0)  # of dropout
    quiet = QUIET | {"accelerator": "cpu", "max_steps": steps, "default_root_dir": folder} | (flags or {})
    trainer = Trainer(**quiet, callbacks=list(callbacks), val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(module, datamodule=data or text())
    return module, trainer


def test_the_course_of_training_is_that_without_the_monitors(tmp_path):
    monitors = TextMonitor(2, 2, length=8), BitsByPosition(2, 2), PhaseMonitor(2, 2), ratio(["*.omega.*"], every=1)
    watched, plain = (fit(tmp_path, *callbacks, dropout=0.2)[0] for callbacks in (monitors, ()))
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, watched.network.state_dict()[name]), name


def test_samples_and_their_repetition(tmp_path):
    data = text()
    module, trainer = fit(tmp_path, TextMonitor(3, 4, prompt=5, length=40), data=data)
    lines = [json.loads(line) for line in (tmp_path / "samples/text-validation-4.jsonl").read_text().splitlines()]
    assert not (tmp_path / "samples/text-validation-2.jsonl").exists()
    outputs = [line["output"] for line in lines]
    held_out = data._texts["validation"].decode()
    assert len(lines) == 3
    assert all(line["prompt"] + line["reference"] in held_out and len(line["prompt"]) == 5 for line in lines)
    measured = {name.removeprefix("validation/"): value.item() for name, value in trainer.callback_metrics.items()}
    assert measured["repetition"] == pytest.approx(repetition_rate(outputs), nan_ok=True)
    assert measured["distinct_2"] == pytest.approx(distinct_n(outputs, 2), nan_ok=True)
    own = [data.decode(row) for row in data.text_rows("train", 3, 40)["tokens"].tolist()]
    assert measured["own_distinct_2"] == pytest.approx(distinct_n(own, 2))
    assert measured["own_repetition"] == pytest.approx(repetition_rate(own))
    trainer.test(module, datamodule=data, verbose=False)
    assert (tmp_path / "samples/text-test-4.jsonl").exists()


class OnRankOne(Callback):
    """Writes the measures of the second process, which early stopping reads there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_rank == 1:
            self.path.write_text(json.dumps({name: float(value) for name, value in trainer.callback_metrics.items()}))


def test_all_processes_have_the_repetition_of_the_first(tmp_path):
    strategy = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"
    monitors = TextMonitor(3, 2, prompt=5, length=200), OnRankOne(tmp_path / "one.json")
    _, trainer = fit(tmp_path, *monitors, steps=2, flags={"devices": 2, "strategy": strategy})
    found = json.loads((tmp_path / "one.json").read_text())
    for name in ("validation/repetition", "validation/distinct_2"):
        assert found[name] == pytest.approx(trainer.callback_metrics[name].item())


def test_bits_by_position(tmp_path):
    data = text()
    module, trainer = fit(tmp_path, BitsByPosition(9, 4), data=data)
    trainer.test(module, datamodule=data, verbose=False)
    batch = data.text_rows("test", 9, 64)
    bits_T = torch.zeros(64, dtype=torch.float64)
    with torch.no_grad():
        for row, labels in zip(batch["tokens"], batch["labels"], strict=True):  # one row at a time
            log_p = module(row[None])[0].log_softmax(1)
            bits_T -= log_p[torch.arange(64), labels].double() / math.log(2) / len(batch["tokens"])
    torch.testing.assert_close(bits_by_position(module, **{f"{k}_BT": v for k, v in batch.items()})[0].detach(), bits_T)
    measured = trainer.callback_metrics
    assert measured["test/bits_at_0_5"].item() == pytest.approx(bits_T[:8].mean().item(), abs=1e-5)
    assert measured["test/bits_at_4"].item() == pytest.approx(bits_T[56:].mean().item(), abs=1e-5)
    short_T = bits_by_position(module, batch["tokens"][:, 48:], batch["labels"][:, 48:])[0]
    growth = (bits_T[56:] - short_T[8:]).mean()
    assert growth != 0
    assert measured["test/bits_growth"].item() == pytest.approx(growth.item(), abs=1e-5)
    assert sum(name.startswith("test/bits_at") for name in measured) == 8


def test_a_model_that_reads_few_positions_has_no_growth_whatever_the_text(tmp_path):
    near = {"pattern": "P", "conv_width": 2, "decay": "none", "window": 4}
    _, trainer = fit(tmp_path, BitsByPosition(9, 4), data=text(), **near)
    measured = {name.removeprefix("validation/bits_"): x.item() for name, x in trainer.callback_metrics.items()}
    assert measured["growth"] == pytest.approx(0, abs=1e-5)
    assert abs(measured["at_4"] - measured["at_1"]) > 1e-3


def test_rows_of_odd_length_have_the_same_names_and_are_measured_to_their_ends(tmp_path):
    data = text(seq_len=15)
    module, trainer = fit(tmp_path, BitsByPosition(9, 4), data=data)
    batch = data.text_rows("validation", 9, 60)
    with torch.no_grad():
        bits_T = bits_by_position(module, batch["tokens"], batch["labels"])[0]
    name = "validation/bits_at_"
    measured = {key.removeprefix(name): x.item() for key, x in trainer.callback_metrics.items() if key.startswith(name)}
    assert list(measured) == ["0_5", "1", "1_5", "2", "2_5", "3", "3_5", "4"]
    for end, (first, last) in {"0_5": (0, 7), "1": (7, 15), "4": (52, 60)}.items():
        assert measured[end] == pytest.approx(bits_T[first:last].mean().item(), abs=1e-5)


def test_rows_of_one_token_have_a_growth(tmp_path):
    data = text(seq_len=1)
    module, trainer = fit(tmp_path, BitsByPosition(4, 4), data=data)
    batch = data.text_rows("validation", 4, 4)
    with torch.no_grad():
        long_T, short_T = (bits_by_position(module, batch["tokens"][:, n:], batch["labels"][:, n:])[0] for n in (0, 3))
    assert "validation/bits_at_0_5" not in trainer.callback_metrics  # half a token
    measured = trainer.callback_metrics["validation/bits_growth"].item()
    assert measured == pytest.approx((long_T[-1] - short_T[-1]).item(), abs=1e-5)


@pytest.mark.parametrize("level", ["byte", "bpe"])
def test_bits_per_character_count_characters_and_not_tokens(tmp_path, level):
    data = text(level=level, bpe_vocab=300)
    module, trainer = fit(tmp_path, BitsByPosition(4, 4, times=1), data=data, vocab_size=300)
    trainer.test(module, datamodule=data, verbose=False)
    rate = len(data._tokens["test"]) / len(data._texts["test"])
    assert rate == 1 if level == "byte" else rate < 0.8
    expected = trainer.callback_metrics["test/loss"].item() / math.log(2) * rate
    assert trainer.callback_metrics["test/bits_per_character"].item() == pytest.approx(expected, rel=1e-5)
    measured = [trainer.callback_metrics[f"test/bits_at_{end}"].item() for end in ("0_5", "1")]
    assert sum(measured) / 2 == pytest.approx(expected, rel=1e-4)  # the same rows


def test_the_memory_of_each_block(tmp_path):
    options = {"decay": "none", "window": 4, "pattern": "PGP", "ensemble": 2}
    module, trainer = fit(tmp_path, PhaseMonitor(3, 4), **options)
    measured = {name: value.item() for name, value in trainer.callback_metrics.items() if "block" in name}
    assert {name.partition("_")[0] for name in measured} == {"validation/block0", "validation/block2"}
    assert measured["validation/block0_effective_window"] == measured["validation/block2_effective_window"] == 4
    assert 0.3 < measured["validation/block0_coherence"] < 1
    assert module.members["validation/coherence"].shape == (2,)
    coherence = (measured["validation/block0_coherence"] + measured["validation/block2_coherence"]) / 2
    assert trainer.callback_metrics["validation/coherence"].item() == pytest.approx(coherence)
    with pytest.warns(UserWarning, match="PhaseMonitor has nothing to measure"):
        fit(tmp_path, PhaseMonitor(3, 4), pattern="A")


def ratio(parameters: list[str], over: tuple[str, ...] = ("*.v_proj.weight",), every: int = 1) -> GradientRatio:
    return GradientRatio("measured", parameters, list(over), every)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_the_ratio_of_gradients_before_they_are_clipped(tmp_path, ensemble):
    parts = ["*.angles.offset.*"], ("*.angles.omega.*",)
    module, _ = fit(tmp_path, ratio(*parts, every=3), angles="query_offset", ensemble=ensemble, steps=3)
    named = dict(module.network.named_parameters())  # the gradients of the last step are still there
    for member in range(ensemble):
        sizes = []
        for part in ("angles.offset", "angles.omega"):
            gradients = [value.grad for name, value in named.items() if part in name]
            own = torch.cat([(grad[member] if ensemble > 1 else grad).flatten() for grad in gradients])
            sizes.append(own.square().mean().sqrt())
        torch.testing.assert_close(module.members["gradient/measured"][member], sizes[0] / sizes[1])
    assert mean_square([], 2, torch.device("cpu")).isnan().all()
    assert mean_square([], 2, torch.device("meta")).device.type == "meta"  # where the other gradients are
    assert (
        "gradient/measured"
        not in fit(tmp_path, ratio(*parts, every=4), angles="query_offset", steps=3)[1].callback_metrics
    )


def test_mistakes_are_told_in_a_sentence(tmp_path):
    needles = NeedleGym(needles=2, seq_len=16, vocab_size=40, batch_size=4, validation_size=4, test_size=4)
    for monitor in (TextMonitor(), BitsByPosition()):
        with pytest.raises(UserError, match=f"{type(monitor).__name__} needs a text, such as TextCorpus,"):
            fit(tmp_path, monitor, data=needles)
    transformer = Separability(256, 16, 16, heads=2, seed=0)
    with pytest.raises(UserError, match="BitsByPosition reads rows of 64 tokens, and the model has positions for 16"):
        fit(tmp_path, BitsByPosition(), module=transformer)
    with pytest.raises(UserError, match="TextMonitor reads rows of 79 tokens, and the model has positions for 16"):
        fit(tmp_path, TextMonitor(), module=transformer)
    with pytest.raises(UserError, match=r"set model\.ensemble to 1"):
        fit(tmp_path, TextMonitor(), ensemble=2)
    with pytest.raises(UserError, match=r"BitsByPosition: the validation part .* 450 tokens, and a row of 640 needs"):
        fit(tmp_path, BitsByPosition(times=40))  # before training, not at the first measure
    with pytest.raises(UserError, match=r"TextMonitor: the validation part .* 450 tokens, and a row of 616 needs"):
        fit(tmp_path, TextMonitor(length=600))
    noise = ActivationNoise("final_residual", 0.1, during=["test"])
    module = Phase(**SIZES)
    with pytest.raises(UserError, match="TextMonitor: generation runs one position at a time, without the hook"):
        fit(tmp_path, TextMonitor(length=8), noise, module=module)
    assert module.global_step == 0  # not at the first measure
    with pytest.raises(UserError, match="Two GradientRatio callbacks would log 'gradient/measured'; keep one"):
        fit(tmp_path, ratio(["*.omega.*"]), ratio(["*.v_proj.weight"]))
    with pytest.raises(UserError, match="no parameter matches"):
        fit(tmp_path, ratio(["*.nothing"]))
    with pytest.raises(UserError, match=r"TextMonitor\.prompt must be at least 1"):
        TextMonitor(prompt=0)
    with pytest.raises(UserError, match=r"TextMonitor\.top_k must be at least 1"):
        TextMonitor(top_k=0)
    with pytest.raises(UserError, match=r"BitsByPosition\.times must be at least 1"):
        BitsByPosition(times=0)
    with pytest.raises(UserError, match=r"GradientRatio\.over is empty"):
        ratio(["*"], over=())
    with pytest.raises(UserError, match="every_n_steps"):
        ratio(["*"], every=0)
