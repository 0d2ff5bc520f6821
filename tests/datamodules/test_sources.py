"""Files and hub data sets that cannot be read: one sentence that names the file and the setting."""

import ast
from pathlib import Path

import datasets
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

import datamodules
from datamodules import TextCorpus, WordProblems
from datamodules.errors import UserError
from datamodules.problems import generate

HEAVY = {"datasets", "pyarrow", "tokenizers", "transformers", "huggingface_hub", "matplotlib", "scipy", "tensorboard"}


def hub(monkeypatch, rows=None, error=None):
    """Replaces the hub by one data set, or by an error; returns what is asked of it."""
    asked = []

    def load_dataset(path, *config, split, streaming):
        if error is not None:
            raise error
        asked.append((path, *config, split))
        return iter(rows[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def generation_error():
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = OSError(28, "No space left on device")
    return error


@pytest.mark.parametrize("kind", [TextCorpus, WordProblems])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "OfflineModeIsEnabled"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub\nor cannot be accessed."), "doesn't exist"),
        (ValueError("BuilderConfig 'main' not found. Available: ['default']"), "BuilderConfig 'main' not found"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "scripts are no longer supported"),
        (generation_error(), "No space left on device"),
    ],
)
def test_a_hub_data_set_that_cannot_be_read(monkeypatch, kind, error, reason):
    hub(monkeypatch, error=error)
    with pytest.raises(UserError, match=r"^data\.path: cannot read 'a/b' from the Hugging Face hub: ") as caught:
        kind("hub", "a/b").setup("fit")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_an_error_in_the_stream_of_rows(monkeypatch):
    def rows():
        yield {"text": "some text"}
        raise ConnectionError("the connection was reset")

    hub(monkeypatch, {"train": rows()})
    with pytest.raises(UserError, match=r"cannot read 'a/b' .* the connection was reset; data.source 'file' reads a"):
        TextCorpus("hub", "a/b", max_size=1000).setup("fit")


def test_word_problems_from_the_hub(monkeypatch):
    rows = {
        split: [{"question": p.question, "answer": p.answer} for p in (generate(0, split, i) for i in range(count))]
        for split, count in (("train", 40), ("test", 10))
    }
    asked = hub(monkeypatch, rows)
    data = WordProblems("hub", batch_size=8, test_sets={"test": 3})
    data.setup("fit")
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert [len(data.train_problems), *map(len, data.eval_problems.values())] == [36, 4, 3]
    assert data.eval_problems["test"][0].question == generate(0, "test", 0).question


def test_other_splits_and_columns_of_the_hub(monkeypatch):
    rows = [{"input": f"Is {i} large?", "target": float(i)} for i in range(8)] + [{"input": "?", "target": None}]
    asked = hub(monkeypatch, {"train": rows, "dev": rows[:3], "exam": rows[:5]})
    columns = {"question": "input", "answer": "target"}
    splits = {"train": "train", "validation": "dev", "test": "exam"}
    data = WordProblems("hub", "a/b", columns=columns, hub_config="hard", splits=splits)
    with pytest.warns(UserWarning, match=r"'a/b' \(data.path\), split 'train': skipped 1 of 9 rows, first row 9 \("):
        data.setup("fit")
    assert asked == [("a/b", "hard", "train"), ("a/b", "hard", "dev"), ("a/b", "hard", "exam")]
    assert [len(data.train_problems), *map(len, data.eval_problems.values())] == [8, 3, 5]
    assert data.train_problems[7].answer == "#### 7"
    hub(monkeypatch, {"train": rows, "test": rows})
    with pytest.raises(UserError, match=r"split 'train' holds no problem: first row 1 \(there is no 'question', only"):
        WordProblems("hub", "a/b").setup("fit")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda path, good: TextCorpus("file", path), "data.path"),
        (lambda path, good: TextCorpus("file", path, level="char"), "data.path"),
        (lambda path, good: WordProblems("file", path), "data.path"),
        (lambda path, good: WordProblems("file", good, path), "data.test_path"),
    ],
)
def test_a_folder_is_not_a_file(tmp_path, make, key):
    good = tmp_path / "good.jsonl"
    good.write_text('{"question": "1?", "answer": "#### 1"}\n')
    with pytest.raises(UserError, match=rf"^{key}: cannot read '{tmp_path}': it is a folder($| that save_to_disk did)"):
        make(str(tmp_path), str(good)).setup("fit")
    with pytest.raises(UserError, match=rf"^no data file at '{tmp_path}/none' \({key}\)$"):
        make(str(tmp_path / "none"), str(good)).setup("fit")


@pytest.mark.parametrize("path", sorted(Path(datamodules.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_heavy_packages_are_imported_where_they_are_used(path):
    imported = set()
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Import):
            imported |= {name.name.partition(".")[0] for name in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            imported.add(statement.module.partition(".")[0])
    assert not imported & HEAVY
