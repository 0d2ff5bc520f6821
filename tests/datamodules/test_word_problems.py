"""WordProblems: sources, sets, user errors, ranks, and runs that resume within an epoch."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import WordProblems
from datamodules.errors import UserError
from datamodules.problem_files import local_rows
from datamodules.problem_rows import Columns, read_problems
from datamodules.problems import Problem, generate, split_of

GSM8K = [
    ("Ann has 1,200 eggs and sells 200. How many?", "Ann keeps 1,200-200=<<1200-200=1000>>1,000 eggs.\n#### 1,000"),
    ("A shop lost $5 on 3 cups each. Its profit?", "It is 3*-5=<<3*-5=-15>>-15.\n#### -15"),
    ("Half of 5 pies?", "5/2=<<5/2=2.5>>2.5\n#### 2.5"),
    ("What share of 50 are 25?", "25/50=<<25/50*100=50>>50%\n#### 50%"),
    ("A house costs $250,000. With $5 tax?", "250000+5=<<250000+5=250005>>250005\n#### $250,005"),
]


def write(path, rows):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows), encoding="utf-8")
    return path


def rows(count):
    return [(f"{'Very ' * (i % 7)}small question {i}?", f"It is {i}.\n#### {i}") for i in range(count)]


def read(path) -> list[Problem]:
    return read_problems(local_rows(str(path), "data.path"), f"'{path}' (data.path)", Columns())


SMALL = {"epoch_size": 64, "validation_size": 4, "test_sets": {"test": 1}}


class Tiny(LightningModule):
    """Predicts a sum of bytes and records its questions."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen, self.validated = torch.nn.Linear(8, 1), [], []

    def collate(self, problems, training):
        features = torch.tensor([[*p.question.encode()[:8].ljust(8)] for p in problems]) / 128
        return {"features": features, "questions": [p.question for p in problems], "training": training}

    def training_step(self, batch, batch_idx):
        assert batch["training"]
        self.seen.append(batch["questions"])
        return (self.layer(batch["features"]) - batch["features"].sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch, batch_idx):
        assert not batch["training"]
        self.validated.append(batch["questions"])

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append(batch["questions"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trainer(path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=path, use_distributed_sampler=False, **quiet, **options)


@pytest.mark.parametrize(
    ("source", "workers", "stop"), [("generated", 0, 5), ("generated", 2, 11), ("file", 0, 11), ("file", 0, 8)]
)
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(tmp_path, source, workers, stop):
    def make():
        common = {"batch_size": 4, "validation_size": 4, "num_workers": workers, "seed": 3, "test_sets": {"test": 2}}
        if source == "generated":
            return WordProblems(epoch_size=32, **common)
        return WordProblems("file", str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"), **common)

    write(tmp_path / "train.jsonl", rows(37))  # 3 of validation, then 8 batches of 4 and 2 left out
    write(tmp_path / "test.jsonl", rows(2))
    whole, resumed = Tiny(), Tiny()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, max_steps=20, callbacks=[keep]).fit(whole, make())
    saved = tmp_path / f"step={stop}.ckpt"
    trainer(tmp_path, max_steps=20, enable_checkpointing=False).fit(resumed, make(), ckpt_path=saved, weights_only=True)
    assert len(whole.seen) == 20
    assert resumed.seen == whole.seen[stop:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert not torch.equal(torch.load(saved, weights_only=True)["state_dict"]["layer.weight"], whole.layer.weight)


@pytest.mark.parametrize(("source", "share", "validated"), [("generated", 2, 2), ("file", 0.34, 1)])
def test_overfitting_repeats_the_first_batches(tmp_path, source, share, validated):
    def make():
        common = {"batch_size": 4, "epoch_size": 32, "validation_size": 3, "eval_batch_size": 1}
        return WordProblems(source, *paths, **common, test_sets={"test": 2})

    paths = [] if source == "generated" else [str(write(tmp_path / "train.jsonl", rows(37)))]
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 8, "overfit_batches": share}
    whole = Tiny()
    trainer(tmp_path, callbacks=[keep], **options).fit(whole, make())
    assert whole.seen == whole.seen[:2] * 4
    assert whole.seen[0] != whole.seen[1]
    assert whole.validated == whole.validated[:validated] * 5  # once before the first step
    for step in (3, 4):  # within an epoch and at its end
        resumed, saved = Tiny(), tmp_path / f"step={step}.ckpt"
        again = trainer(tmp_path, enable_checkpointing=False, **options)
        again.fit(resumed, make(), ckpt_path=saved, weights_only=True)
        assert resumed.seen == whole.seen[step:]
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_generated_sets(tmp_path):
    data = WordProblems(validation_size=10, test_sets={"heldout": 4, "twin": 6, "passkey": 4}, eval_batch_size=3)
    module = Tiny()
    trainer(tmp_path, enable_checkpointing=False).test(module, data, verbose=False)
    sets = data.test_dataloader()
    assert list(sets) == ["heldout", "twin", "passkey"]
    assert sum(len(batch) for batch in module.seen) == 14
    twins = sorted(p.pair for p in data.eval_problems["twin"])
    assert twins == [0, 0, 1, 1, 2, 2]
    assert [p.template[:7] for p in data.eval_problems["passkey"]] == ["passkey"] * 4
    assert {split_of(p.question) for p in data.eval_problems["validation"]} == {"validation"}
    assert data.eval_problems["heldout"] == [generate(0, "test", i, held_out=True) for i in range(4)]
    sample = [q for batch in data.sample_dataloader(5) for q in batch["questions"]]
    assert sorted(sample) == sorted(p.question for p in data.eval_problems["validation"][:5])


def test_the_proportion_of_passkeys():
    data = WordProblems(passkey_fraction=0.05)
    share = sum(data.train_problem(i).template.startswith("passkey") for i in range(4000)) / 4000
    assert share == pytest.approx(0.05, abs=0.01)


def test_the_seed_is_that_of_the_training_problems_alone(tmp_path):
    path = str(write(tmp_path / "a.jsonl", rows(60)))

    def questions(*source, **options):
        data = WordProblems(*source, **SMALL | {"batch_size": 8} | options)
        data.setup("fit")
        held_out = [problem.question for part in data.eval_problems.values() for problem in part]
        return [[p.question for p in batch] for batch in data.train_dataloader()], held_out

    for source, options in (((), {}), ((), {"passkey_fraction": 1.0}), (("file", path), {})):
        one, again, other = (questions(*source, seed=seed, **options) for seed in (0, 0, 1))
        assert one == again
        assert one[1] == other[1]
        assert one[0] != other[0]
        assert not {question for batch in one[0] for question in batch} & set(one[1])


def test_a_file_of_gsm8k_scores_against_itself(tmp_path):
    problems = read(write(tmp_path / "gsm8k.jsonl", GSM8K))
    assert len(problems) == len(GSM8K)
    assert all(p.is_correct(p.answer) for p in problems)
    assert not any(p.is_correct(q.answer) for p in problems for q in problems if p is not q)
    assert problems[0].entities["name"] == ("Ann",) or problems[0].entities["name"] == ()


def test_jsonl_sets_do_not_overlap(tmp_path):
    data = WordProblems("file", str(write(tmp_path / "a.jsonl", rows(100))), batch_size=8, test_sets={"test": 7})
    data.setup("fit")
    sets = [data.train_problems, *data.eval_problems.values()]
    assert [len(s) for s in sets] == [81, 9, 7]
    assert len({p.question for s in sets for p in s}) == 97
    assert len(data.texts(5)) == 5


def test_a_batch_larger_than_the_data_is_all_of_it(tmp_path):
    data = WordProblems("file", str(write(tmp_path / "a.jsonl", rows(30))), batch_size=64, validation_size=3)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(p.question for p in batch) == sorted(p.question for p in data.train_problems)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_too_few_problems(tmp_path, count):
    data = WordProblems("file", str(write(tmp_path / "a.jsonl", rows(count))))
    if count == 10:
        data.setup("fit")
        assert [len(data.train_problems), *map(len, data.eval_problems.values())] == [8, 1, 1]
    else:
        with pytest.raises(ValueError, match="holds too few problems"):
            data.setup("fit")


def test_broken_lines_are_counted_in_one_warning(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(3))
    good = path.read_bytes()
    path.write_bytes(
        b"\xef\xbb\xbf" + good + b'{"question": "cut of\n\n[1]\n\xff\xfe\x00\n{"question": "q", "answer": "?"}\n'
    )
    with pytest.warns(UserWarning, match=r"skipped 4 of 7 lines, first line 4 \(") as caught:
        assert len(read(path)) == 3
    assert len(caught) == 1


def test_lines_that_no_tokenizer_takes_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(3))
    good = path.read_text().replace("\n", "\r")  # line ends of other systems
    lines = [
        '{"question": "\\ud800?", "answer": "#### 1"}',
        '{"question": ' + "[" * 40_000,
        '{"question": ' + "9" * 5000,
    ]
    lines.append('{"question": "\\ud83d\\ude00 1?", "answer": "#### 1"}')  # a whole pair is one character
    path.write_text(good + "\n".join(lines))
    with pytest.warns(UserWarning, match="skipped 3 of 7 lines"):
        problems = read(path)
    assert problems[-1].question == "\U0001f600 1?"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\n\n", "it is empty"),
        (bytes(range(256)) * 4, "first line 1"),
        (b'{"question": 1, "answer": "#### 1"}\n', "first line 1 ('question' is no text, but 1)"),
        (b'{"question": "q", "answer": "none"}\n', "the answer 'none' is no number, and has no '####'"),
    ],
)
def test_a_file_without_problems(tmp_path, content, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no problem") as caught:
        read(path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no data file at"):
        read(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"source": "file"}, "needs data.path"),
        ({"path": "a.jsonl"}, "data.path is not read"),
        ({"test_path": "a.jsonl"}, "data.test_path is not read"),
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"validation_size": 0}, "data.validation_size must be at least 1"),
        ({"validation_size": 2001}, "data.validation_size must be at most 2000"),
        ({"test_sets": {"twin": 2001}}, "data.test_sets.twin must be at most 2000"),
        ({"test_sets": {"tset": 1}}, "no set 'tset'"),
        ({"source": "file", "path": "a", "test_sets": {"twin": 1}}, "no set 'twin'"),
        ({"epoch_size": 10}, "data.epoch_size"),
        ({"num_workers": 3}, "0, 1, 2, 4 or 8"),
    ],
)
def test_user_errors(options, reason):
    with pytest.raises(ValueError, match=reason):
        WordProblems(**options)


def on_ranks(world, **options):
    for rank in range(world):
        data = WordProblems(**options)
        data.trainer = SimpleNamespace(
            overfit_batches=0, limit_train_batches=1.0, global_rank=rank, world_size=world, lightning_module=None
        )
        data.setup("fit")
        yield data


def test_ranks_share_every_set_in_as_many_steps():
    problems: list[list[Problem]] = []
    steps = set()
    for data in on_ranks(2, validation_size=11, eval_batch_size=5, test_sets={"test": 7}):
        validation = list(data.val_dataloader())
        problems += validation
        steps.add(len(validation))
    assert steps == {2}
    assert sorted(p.question for batch in problems for p in batch) == sorted(
        p.question for p in data.eval_problems["validation"]
    )


def test_ranks_train_on_the_same_global_batches():
    (one,) = on_ranks(1, batch_size=8, **SMALL)
    two = [list(data.train_dataloader()) for data in on_ranks(2, batch_size=4, **SMALL)]
    for number, batch in enumerate(one.train_dataloader()):
        assert {p.question for p in batch} == {p.question for share in two for p in share[number]}


def test_a_rank_without_problems():
    data, *_ = on_ranks(4, validation_size=3, test_sets={"test": 1})
    with pytest.raises(ValueError, match="3 validation problems in 1 batches leave some of 4 devices without any"):
        data.val_dataloader()
    data, *_ = on_ranks(4, **SMALL)
    with pytest.raises(ValueError, match=r"epoch_size \(64\) is smaller than a batch of all devices \(256\)"):
        data.train_dataloader()


def test_no_test_set_at_all_is_refused():
    with pytest.raises(ValueError, match=r"^data\.test_sets is empty: name at least one of \['test', 'heldout', "):
        WordProblems(test_sets={})
