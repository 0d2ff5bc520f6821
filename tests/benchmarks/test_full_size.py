"""The parts of the benchmark of full size."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import step_losses
from benchmarks.full_size_pair import Kept, write_pair, write_problems
from benchmarks.full_size_steps import Parts
from benchmarks.step_phases import PHASES, Phases
from benchmarks.step_rates import WARMUP, Part, Rates
from datamodules.problems import generate
from lightning_modules.core.contracts import Workload


@pytest.fixture
def data(tmp_path):
    problems = [generate(0, "train", index) for index in range(80)]
    file = tmp_path / "train.jsonl"
    lines = [json.dumps({"question": problem.question, "answer": problem.answer}) for problem in problems]
    file.write_text("\n".join(lines))
    return file


def test_the_pair_has_the_shapes_of_llama_and_mistral_and_a_tokenizer_of_the_text(tmp_path, data):
    size = write_pair(tmp_path, data, 32, tiny=False)
    parts = {name: Kept(str(tmp_path / name), random_init=True) for name in ("source", "target")}
    tokenizer = parts["target"].load_tokenizer()
    question = json.loads(data.read_text().splitlines()[0])["question"]
    tokens = tokenizer(question)["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == question
    assert tokens[0] == tokenizer.bos_token_id
    assert max(tokens) < size == len(tokenizer)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(part.load_config()) for part in parts.values()]
    assert [model.num_parameters() for model in models] == [8030261248, 7248023552]  # as on the models' cards


def test_a_model_is_loaded_once(tmp_path, data):
    write_pair(tmp_path, data, 2, tiny=True)
    kept = Kept(str(tmp_path / "target"), random_init=True)
    assert kept.load_causal_lm() is kept.load_causal_lm()


def test_problems_for_training_and_test_differ(tmp_path, data):
    files = write_problems(tmp_path, data, 50)
    rows = [set(Path(file).read_text().splitlines()) for file in files.values()]
    assert [len(some) for some in rows] == [50, 30]
    assert not rows[0] & rows[1]


def test_each_size_of_batches_has_all_problems_once_behind_its_largest_batch(tmp_path, data, monkeypatch):
    def work(batch):
        return Workload(len(batch), sum(len(problem.question) for problem in batch), 0)

    sizes = [Part(2), Part(8), Part(4, steps=3)]
    parts = Parts(sizes, **write_problems(tmp_path, data, 65))
    parts.setup("fit")
    monkeypatch.setattr(Parts, "_module", SimpleNamespace(workload=work))
    batches = list(parts.train_dataloader())
    assert [len(batch) for batch in batches] == [2] * 34 + [8] * 10 + [4] * 3
    assert [part.steps for part in sizes] == [34, 10, 3]
    for part in (batches[:34], batches[34:44]):
        warm, timed = part[:WARMUP], part[WARMUP:]
        assert len({problem.question for batch in timed for problem in batch}) == 64
        assert all(work(batch).tokens == max(work(some).tokens for some in timed) for batch in warm)


def test_rates_leave_out_the_first_steps_of_each_size(monkeypatch, capsys):
    clock = iter((10.0, 14.0, 20.0, 21.0))  # the start and the end of what counts, of two sizes
    monkeypatch.setattr("benchmarks.step_rates.time.perf_counter", lambda: next(clock))
    kept = []
    parts = [Part(2, None, WARMUP + 4), Part(256, 700, WARMUP + 1), Part(64, None, 9)]
    rates = Rates("V15", parts, peak=1000.0, keep=kept.append)
    for _ in range(WARMUP):
        rates.count(Workload(2, 999, 10**6))
    for _ in range(4):
        rates.count(Workload(2, 300, 500))
    assert len(kept) == 1  # as soon as it is measured
    for _ in range(WARMUP + 1):
        rates.count(Workload(5, 600, 100))
    rates.out_of_memory()
    first, second, third = rates.rows
    assert (first["rows"], first["samples_per_s"], first["ms"], first["mfu"]) == ("2", 2.0, 1000.0, 0.5)
    assert (first["positions"], first["most"]) == (150, 999)
    assert (second["rows"], second["samples_per_s"], second["most"]) == ("700 positions", 5.0, 600)
    assert third == {"way": "V15", "rows": "64", "gib": None}
    assert len(rates.rows) == len(kept) == 3
    assert "out of memory" in capsys.readouterr().out


def test_phases_fill_the_steps_that_count(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("callbacks.step_phases.time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    phases = Phases(1, 3)
    for step in range(4):
        phases.on_train_batch_start(None, None, None, step)
        for phase in PHASES[:5]:
            phases._mark(phase)
        phases.on_train_batch_end()
    spent = phases.milliseconds()
    assert [spent[phase] for phase in PHASES[:-1]] == [1000.0] * 6
    assert spent["between"] == 500.0


def test_losses_are_compared_step_by_step(tmp_path, monkeypatch, capsys):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, losses in zip(files, ([1.0, 2.0], [1.0, 2.25]), strict=True):
        file.write_text(json.dumps(losses))
    monkeypatch.setattr("sys.argv", ["step_losses", *map(str, files)])
    step_losses.main()
    assert "largest difference: 2.5e-01" in capsys.readouterr().out
