"""Source states in files: the same losses without the source in memory, and files that are never trusted blindly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file

from datamodules import WordProblems
from datamodules.errors import UserError
from datamodules.problems import generate
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.telepathy import PerceiverBridge, source_cache
from lightning_modules.telepathy.source_cache import FOLDER, SourceCache

SIZES = {name: size for name, size in SMALL.items() if name != "epoch_size"}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with problems in a file."""
    monkeypatch.chdir(tmp_path)
    problems = [generate(7, "train", index) for index in range(40)]
    rows = [json.dumps({"question": problem.question, "answer": problem.answer}) for problem in problems]
    Path("train.jsonl").write_text("\n".join(rows))
    Path("test.jsonl").write_text("\n".join(rows[:6]))
    return tmp_path


class Losses(Callback):
    """Records every loss, and whether the source is in memory."""

    def __init__(self):
        self.losses, self.sizes = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.sizes.append(sum(parameter.numel() for parameter in module.source.parameters()))


def data(**options) -> WordProblems:
    return WordProblems("file", "train.jsonl", "test.jsonl", **SIZES | options)


def files() -> list[Path]:
    return sorted(Path("runs/source_states").rglob("*.safetensors"))


def reading(monkeypatch) -> list[int]:
    """The number of questions in each call of the source from now on."""
    calls, read = [], Pretrained.load_first_layers

    def load(pretrained, layers):
        model = read(pretrained, layers)
        model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        return model

    monkeypatch.setattr(Pretrained, "load_first_layers", load)
    return calls


@pytest.mark.parametrize(
    "options",
    [{"objectives": {"lm": 1.0, "reconstruction": 1.0}}, {"source_layer": [1, 3], "bridge": PerceiverBridge}],
    ids=["token and states read back", "perceiver"],
)
def test_training_is_the_same_without_the_source_in_memory(place, telepathy, fit, options):
    runs = []
    for cached in (False, True):
        watch, module = Losses(), telepathy(cache_source=cached, normalizer="statistical", max_new_tokens=8, **options)
        trainer = fit(module, 8, data(), callbacks=[watch], limit_val_batches=1, val_check_interval=4)
        trainer.test(module, datamodule=data(), verbose=False)
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if not name.endswith("_ms")}
        runs.append((watch, metrics))
    (plain, metrics), (cached, other) = runs
    assert len(plain.losses) == 8
    assert min(plain.sizes) > 0
    assert cached.sizes == [0] * 8
    # What a row gives depends on the rows beside it in its last bits
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert other == pytest.approx(metrics, rel=1e-4, abs=1e-5, nan_ok=True)


def test_states_are_those_of_the_source_bit_by_bit(place, telepathy, fit):
    for dtype in ("float32", "bfloat16"):
        module = telepathy(cache_source=True)
        plain = telepathy()
        for each in (module, plain):
            each.source.model.to(getattr(torch, dtype))
        fit(module, 1, data(batch_size=4))
        questions = sorted(data_questions(), key=lambda text: (len(plain.source.tokenize([text])["source"][0]), text))
        for start in range(0, len(questions), 32):  # the batches of the writer
            some = questions[start : start + 32]
            batch = module.source.tokenize(some)
            assert batch["states"].dtype == getattr(torch, dtype)
            mask_BS = batch["source_mask"]
            expected_BSC = plain.source.read(plain.source.tokenize(some))
            assert torch.equal(module.read(batch)[mask_BS], expected_BSC[mask_BS])
    assert len({file.parent for file in files()}) == 2


def data_questions() -> list[str]:
    made = data()
    made.setup("fit")
    return sorted(set(made.questions()))


def test_states_are_written_once(place, telepathy, fit, monkeypatch):
    monkeypatch.setattr("lightning_modules.telepathy.source_cache.FILE_BYTES", 40_000)
    calls = reading(monkeypatch)
    fit(telepathy(cache_source=True), 1, data(num_workers=2))
    assert sum(calls) >= 40
    written = {file: file.stat().st_mtime_ns for file in files()}
    assert len(written) > 3
    calls.clear()
    fit(telepathy(cache_source=True), 1, data(batch_size=4))
    assert calls == []
    assert {file: file.stat().st_mtime_ns for file in files()} == written


def change_weights(module) -> None:
    with torch.no_grad():
        module.source.model.model.layers[0].mlp.up_proj.weight[0] += 1e-3


def change_data(module) -> None:
    file = Path("train.jsonl")
    file.write_text(file.read_text().replace("How", "Now how", 1))


@pytest.mark.parametrize(
    ("options", "flags", "change"),
    [
        ({"source_layer": 2}, {}, None),
        ({"source_prompt": "Read: {question}"}, {}, None),
        ({}, {"precision": "bf16-mixed"}, None),
        ({}, {}, change_weights),
        ({}, {}, change_data),
    ],
    ids=["layer", "prompt", "precision", "weights", "data"],
)
def test_another_source_has_another_cache(place, telepathy, fit, options, flags, change):
    fit(telepathy(cache_source=True), 1, data())
    module = telepathy(cache_source=True, **options)
    if change:
        change(module)
    fit(module, 1, data(), **flags)
    assert len({file.parent for file in files()}) == 2


def damage_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def swap(file: Path) -> None:
    file.write_bytes(next(other for other in files() if other != file).read_bytes())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_bit, "its checksum is wrong"),
        (lambda file: file.write_bytes(file.read_bytes()[:-50]), "it cannot be read"),
        (lambda file: file.write_bytes(b"x"), "it cannot be read"),
        (swap, "it belongs to another cache"),
        (Path.unlink, None),
    ],
    ids=["bit", "cut", "no format", "swapped", "missing"],
)
def test_a_damaged_file_is_named_and_written_again(place, telepathy, fit, monkeypatch, damage, reason, recwarn):
    monkeypatch.setattr("lightning_modules.telepathy.source_cache.FILE_BYTES", 40_000)
    watch = Losses()
    fit(telepathy(cache_source=True), 3, data(), callbacks=[watch])
    before = {file: load_file(file)["states"].clone() for file in files()}  # not mapped into memory
    damaged = files()[1]
    damage(damaged)
    again = Losses()
    recwarn.clear()
    fit(telepathy(cache_source=True), 3, data(), callbacks=[again])
    said = [str(warning.message) for warning in recwarn if "cache_source" in str(warning.message)]
    assert len(said) == (reason is not None)
    assert all(str(damaged) in text and reason in text for text in said)
    assert again.losses == watch.losses
    assert all(torch.equal(load_file(file)["states"], states_NC) for file, states_NC in before.items())


def made_cache(folder: Path) -> SourceCache:
    questions = [f"question {number}" for number in range(20)]
    return SourceCache({"weights": "x"}, questions, [[1, 2]] * 20, [2] * 20, 3, folder)


def states_of(questions) -> list[torch.Tensor]:
    return [torch.full((2, 3), float(text.split()[1])) for text in questions]


def test_two_runs_that_write_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.telepathy.source_cache.FILE_BYTES", 60)
    first, second = made_cache(tmp_path), made_cache(tmp_path)
    nested = []

    def states(questions):
        if not nested:
            nested.append(second.fill(states_of))  # the other run writes all while this one is at its first file
        return states_of(questions)

    assert first.fill(states) >= 1
    for cache in (first, second, made_cache(tmp_path)):
        assert cache.fill(lambda questions: pytest.fail("all files are there")) == 0
        assert torch.equal(cache.read(["question 7", "question 3"])[:, 0, 0], torch.tensor([7.0, 3.0]))
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in written} == {".safetensors"}
    assert len(written) == 7  # of three questions, the last one of two


def test_states_are_zero_behind_the_end_of_a_question(tmp_path):
    cache = SourceCache({}, ["a", "bc"], [[1], [1, 2]], [1, 2], 3, tmp_path)
    cache.fill(lambda questions: [torch.ones(len(text), 3) for text in questions])
    assert cache.read(["bc", "a"])[..., 0].tolist() == [[1, 1], [1, 0]]


def test_ranks_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.telepathy.source_cache.FILE_BYTES", 60)
    read = []
    caches = [made_cache(tmp_path), made_cache(tmp_path)]

    def states(questions):
        read.extend(questions)
        return states_of(questions)

    # Alone: nobody has written the other half
    with pytest.raises(
        ValueError, match=rf"{tmp_path}.+ must lie on a file system .*: one of them lacks {tmp_path}.*-"
    ):
        caches[0].fill(states, rank=0, world=2)
    assert caches[1].fill(states, rank=1, world=2) > 0
    assert sorted(read) == sorted(f"question {number}" for number in range(20))


def test_a_file_that_another_machine_does_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(source_cache, "gather_objects", lambda item: [item, ["there/states-3"] if item == [] else item])
    with pytest.raises(UserError, match=rf"{tmp_path}.+ must lie on .*: one of them lacks there/states-3$"):
        made_cache(tmp_path).fill(states_of)


def test_every_rank_tells_of_its_damaged_files(tmp_path, monkeypatch):
    monkeypatch.setattr(source_cache, "FILE_BYTES", 60)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    made_cache(tmp_path).fill(states_of)
    damaged = sorted(tmp_path.rglob("*.safetensors"))[1]
    damage_bit(damaged)
    with pytest.warns(UserWarning, match=f"{damaged} is damaged, .*; it is written again"):
        assert made_cache(tmp_path).fill(states_of, rank=1, world=2) == 1


def test_a_question_that_the_source_has_not_read(place, telepathy, fit, problems):
    module = telepathy(cache_source=True)
    fit(module, 1, data())
    fit(module, 1, data())  # the source is not needed again
    other = replace(problems[0], question="Who is there?")
    with pytest.raises(ValueError, match=r"model.cache_source: the source has not read 'Who is there\?'"):
        module.collate([other], False)
    change_data(module)
    with pytest.raises(ValueError, match=r"model.cache_source: the source was freed in an earlier fit, on other data"):
        fit(module, 1, data())


@pytest.mark.parametrize("is_dry", [False, True])
def test_problems_without_an_end_are_refused(telepathy, fit, place, is_dry):
    with pytest.raises(ValueError, match=r"model.cache_source needs problems that are read more than once"):
        fit(telepathy(cache_source=True), 1, fast_dev_run=is_dry)
    assert not Path("runs").exists()


def test_data_without_questions_is_refused():
    with pytest.raises(UserError, match=r"model.cache_source: dict has no questions"):
        source_cache.fixed_questions({})


def test_a_dry_run_writes_no_states(telepathy, fit, place):
    fit(telepathy(cache_source=True), 1, data(), fast_dev_run=True)
    assert not Path("runs").exists()


def test_ddp_leaves_the_frozen_models_alone(telepathy):
    module = telepathy()
    ignored = set(module._ddp_params_and_buffers_to_ignore)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained.isdisjoint(ignored)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen <= ignored
    assert all(name.startswith(("source.", "target.")) for name in ignored)


def test_a_folder_that_cannot_be_made_is_told(place, telepathy, fit):
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    FOLDER.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"model.cache_source: cannot write .*: (Not a directory|File exists)"):
        fit(telepathy(cache_source=True), 1, data())
