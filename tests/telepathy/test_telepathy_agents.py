"""A chain of two agents: what passes through it, and its measures on known times."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import QUIET, ROOT, SMALL
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from transformers import AutoConfig, AutoModelForCausalLM

import main
from callbacks import AgentChain
from datamodules import WordProblems
from datamodules.errors import UserError
from datamodules.problems import generate
from lightning_modules.core.intervals import wilson_interval
from lightning_modules.pretrained.answers import Answer
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.telepathy import agents
from lightning_modules.telepathy.agents import Passage, Writer, measure_chain, pass_on

SOURCE = Pretrained(str(ROOT / "assets" / "pair" / "source"))
REPEAT = "Question: {question}\nRepeat:"
PROBLEMS = [generate(5, "validation", index) for index in range(8)]


@pytest.fixture(scope="module")
def writer():
    return Writer(SOURCE, REPEAT, "cpu")


def test_the_source_writes_the_question_out(writer):
    messages = [writer.write(problem.question) for problem in PROBLEMS]
    assert sum(m == p.question for m, p in zip(messages, PROBLEMS, strict=True)) >= 7
    short = writer.write(PROBLEMS[0].question, 3)
    assert messages[0].startswith(short)
    assert len(short) < len(messages[0]) / 3
    # A model that does not end its message is stopped at twice the length of the question
    endless = Writer(Pretrained(SOURCE.path, random_init=True), REPEAT, "cpu")
    question = PROBLEMS[0].question
    count = partial(len, endless.tokenizer(question, add_special_tokens=False)["input_ids"])
    assert count() / 2 < len(endless.tokenizer(endless.write(question))["input_ids"]) < 4 * count()


def test_by_text_the_target_answers_the_message_and_not_the_question(writer, telepathy):
    module = telepathy().eval()
    passages = pass_on(module, writer, PROBLEMS, 100)
    rows = module.target.rows.text([p.message for p in passages], [""] * 8)
    assert [p.text_answer for p in passages] == [a.text for a in module.target.answers(rows, 100)]
    assert [p.soft_answer for p in passages] == module.answer([p.question for p in PROBLEMS], 100)
    assert all(0 < p.first_written < p.write and 0 < p.first_replied < p.reply and p.soft > 0 for p in passages)
    assert sum(p.problem.is_correct(p.text_answer) for p in passages) >= 6

    class Garbled:
        def write(self, question: str, limit: int | None = None) -> str:
            return PROBLEMS[0].question

    garbled = pass_on(module, Garbled(), PROBLEMS[:2], 100)
    assert garbled[0].text_answer == garbled[1].text_answer == passages[0].text_answer


def test_measures_of_known_times():
    passages = [
        Passage(
            p, p.question if i else "", p.answer if i < 6 else "", p.answer if i < 2 else "", 6, 4, 1, 1.5, 4 + i % 2
        )
        for i, p in enumerate(PROBLEMS)
    ]
    measures = measure_chain(passages)
    assert measures.values["text_ms"] == 10
    assert measures.values["soft_ms"] == 4.5
    assert measures.values["saving"] == pytest.approx(0.55)
    assert measures.values["generation"] == pytest.approx(0.75)
    assert measures.values["message"] == pytest.approx(0.6)
    assert measures.hits == {"text_accuracy": 6, "soft_accuracy": 2, "message_accuracy": 7}
    assert measures.intervals["text_accuracy"] == wilson_interval(6, 8)
    low, high = measures.intervals["saving"]
    assert 0.5 <= low < 0.55 < high <= 0.6
    assert np.ptp(measures.intervals["generation"]) == pytest.approx(0)


def test_a_test_reports_the_chain(workplace):
    chain = [{"class_path": "AgentChain", "init_args": {"writer": {"path": "assets/pair/source"}, "n_samples": 3}}]
    sizes = {"data.test_sets.test": 16, "data.validation_size": 16, "model.max_new_tokens": 8}
    sizes |= {
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": json.dumps(chain),
    }
    options = [text for key, value in sizes.items() for text in (f"--{key}", str(value))]
    done = main.main(["test", "--config", "configs/telepathy_v15.yaml", *options])
    record = json.loads(Path(done.run_dir, "results.json").read_text())
    assert record["metrics"]["chain/text_ms"] > 0
    assert record["metrics"]["chain/message_accuracy"] >= 2 / 3
    assert {record["n"][f"chain/{name}"] for name in ("text_ms", "saving", "soft_accuracy")} == {3}
    assert len(record["intervals"]["chain/saving"]) == 2


def test_a_writer_reads_the_bos_and_ends_where_the_next_question_begins(writer, monkeypatch):
    calls = []
    monkeypatch.setattr(agents, "generate", lambda *args: calls.append(args[2:]) or [Answer("7", False)])
    assert writer.write("x", 5) == "7"
    tokens = writer.tokenizer("Question: x\nRepeat:", add_special_tokens=False)["input_ids"]
    assert calls == [([[writer.tokenizer.bos_token_id, *tokens]], 5, "Question:")]


def test_a_writer_has_positions_for_the_question_and_the_message(writer, monkeypatch):
    tokens = 1 + len(writer.tokenizer("Question: x\nRepeat:", add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(writer, "positions", tokens + 5)
    writer.write("x", 5)
    expected = (
        rf"^AgentChain\.writer: the question 'x'\.\.\. takes {tokens + 6} positions, 6 of them for the message, and"
    )
    with pytest.raises(UserError, match=expected):
        writer.write("x", 6)


def test_an_encoder_is_no_writer(tmp_path):
    config = AutoConfig.for_model("bert", hidden_size=24, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^AgentChain\.writer: '.*' reads the tokens that it predicts: choose another"):
        Writer(Pretrained(str(tmp_path)), REPEAT, "cpu")


def test_what_is_refused(telepathy):
    with pytest.raises(UserError, match="`n_samples` must be at least 1"):
        AgentChain(SOURCE, 0)
    trainer = Trainer(callbacks=AgentChain(SOURCE), accelerator="cpu", **QUIET)
    with pytest.raises(UserError, match="needs a bridge between two models, not BoringModel"):
        trainer.test(BoringModel(), verbose=False)
    trainer = Trainer(callbacks=AgentChain(SOURCE, prompt="Repeat"), accelerator="cpu", **QUIET)
    with pytest.raises(UserError, match=r"^AgentChain\.prompt needs one"):
        trainer.test(telepathy(), datamodule=WordProblems(**SMALL), verbose=False)
