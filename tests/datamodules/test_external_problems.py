"""Word problems from files of every form: SVAMP, GSM-Hard, ASDiv and MAWPS in one line of YAML each."""

import csv
import gzip
import json

import pytest
import yaml
from datasets import Dataset, DatasetDict, load_from_disk

from datamodules import WordProblems
from datamodules.errors import UserError

SVAMP = [
    {
        "ID": f"chal-{i}",
        "Body": f"Ann has {i + 3} apples, {i} of them red.",
        "Question": "How many are not red?",
        "Equation": f"( {i + 3}.0 - {i}.0 )",
        "Answer": 3.0,
    }
    for i in range(30)
]
GSM_HARD = [
    {"input": f"A lamp costs ${i},732,419.5. And two?", "code": "pass", "target": i * 1e6} for i in range(1, 20)
]
ASDIV = [{"Body": "", "Question": f"What is 9 + {i}?", "Answer": f"{i + 9} (apples)"} for i in range(20)]
ASDIV.append({"Body": "He has 9.", "Question": "Which numbers?", "Answer": "9 (apples); 7 (pears)"})
MAWPS = [{"sQuestion": f"Sam has {i} balls. How many?", "lSolutions": [float(i)]} for i in range(20)]


def write(path, rows):
    """Writes rows in the form that the ending of the path tells."""
    match path.suffix:
        case ".csv" | ".tsv":
            with open(path, "w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, [*rows[0]], delimiter="," if path.suffix == ".csv" else "\t")
                table.writeheader()
                table.writerows(rows)
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        case "":
            Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(line: str, **options) -> WordProblems:
    return WordProblems(**yaml.safe_load(f"{{{line}}}"), **options)


@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ""])
def test_svamp(folder, form):
    write(folder / f"train{form}", SVAMP[:20])
    write(folder / f"test{form}", SVAMP[20:])
    columns = "columns: {question: [Body, Question], answer: Answer}"
    svamp = data(f"source: file, path: train{form}, test_path: test{form}, {columns}")
    svamp.setup("fit")
    assert [len(svamp.train_problems), *map(len, svamp.eval_problems.values())] == [18, 2, 10]
    problem = svamp.eval_problems["test"][2]
    assert problem.question == "Ann has 25 apples, 22 of them red. How many are not red?"
    assert problem.answer == "#### 3"
    assert problem.is_correct("#### 3.00")
    assert svamp.answers() == ["#### 3"] * 30


@pytest.mark.parametrize("form", [".jsonl", ".csv", ".parquet"])
def test_gsm_hard_has_a_test_set_only(folder, form):
    write(folder / f"hard{form}", GSM_HARD)
    columns = "columns: {question: input, answer: target}"
    hard = data(f"source: file, test_path: hard{form}, {columns}", test_sets={"test": 7})
    hard.setup("test")
    assert [p.answer for p in hard.eval_problems["test"]] == [f"#### {i}000000" for i in range(1, 8)]
    assert sum(len(batch) for batch in hard.test_dataloader()["test"]) == 7
    for stage in ("fit", "validate"):
        with pytest.raises(UserError, match=f"^data: {stage} needs more than test problems: set data.path too$"):
            hard.setup(stage)
    with pytest.raises(UserError, match=r"^data: a new tokenizer needs more than test problems"):
        hard.texts(5)


@pytest.mark.parametrize("form", [".jsonl", ".csv", ".parquet", ""])
def test_asdiv(folder, form):
    write(folder / f"asdiv{form}", ASDIV)
    asdiv = data(f"source: file, path: asdiv{form}, columns: {{question: [Body, Question], answer: Answer}}")
    with pytest.warns(UserWarning, match=r"skipped 1 of 21 (lines|rows), first (line|row) 2[12] \(the answer '9 \(app"):
        asdiv.setup("fit")
    assert asdiv.train_problems[4].question == "What is 9 + 4?"
    assert asdiv.train_problems[4].answer == "#### 13"


def test_mawps(folder):
    write(folder / "mawps.json", MAWPS)
    mawps = data("source: file, path: mawps.json, columns: {question: sQuestion, answer: lSolutions}")
    mawps.setup("fit")
    assert mawps.train_problems[7].answer == "#### 7"


def test_a_saved_data_set_with_splits(folder):
    parts = {"train": Dataset.from_list(SVAMP[:20]), "dev": Dataset.from_list(SVAMP[20:24])}
    DatasetDict(parts | {"test": Dataset.from_list(SVAMP[24:])}).save_to_disk("svamp")
    common = "source: file, path: svamp, columns: {question: [Body, Question], answer: Answer}"

    def sizes(more=""):
        made = data(common + more)
        made.setup("test")
        return {"train": len(made.train_problems)} | {name: len(part) for name, part in made.eval_problems.items()}

    assert sizes() == {"train": 18, "validation": 2, "test": 6}
    assert sizes(", splits: {train: train, validation: dev, test: test}") == {"train": 20, "validation": 4, "test": 6}
    assert sizes(", splits: {train: train}") == {"train": 17, "validation": 1, "test": 2}
    assert sizes(", splits: {test: dev}") == {"train": 0, "test": 4}
    with pytest.raises(
        UserError, match=r"^data.path: 'svamp' has no split 'dve', only \['train', 'dev', 'test'\]: set"
    ):
        sizes(", splits: {train: dve}")
    with pytest.raises(UserError, match=r"name the split of 'train' too, data.splits is \{'test': 'dev'\}"):
        data(common + ", splits: {test: dev}").setup("fit")


def test_references_in_other_formats(folder):
    rows = [{"question": f"1 + {i}?", "answer": f"Add 1 and {i}, so the answer is {i + 1} apples."} for i in range(20)]
    write(folder / "a.jsonl", [*rows, {"question": "Which?", "answer": "the answer is unknown"}])
    for answer_format in ("last_number", r"answer is (\d+)"):
        made = WordProblems("file", "a.jsonl", answer_format=answer_format)
        with pytest.warns(UserWarning, match="skipped 1 of 21 lines, first line 21"):
            made.setup("fit")
        assert made.train_problems[4].answer == rows[4]["answer"]
        assert made.train_problems[4].is_correct("Hence the answer is 5")
        assert not made.train_problems[4].is_correct("Hence the answer is 4")
    generated = WordProblems(answer_format="last_number", passkey_fraction=0.5, test_sets={"test": 1})
    generated.setup("fit")
    problems = [*map(generated.train_problem, range(9)), *generated.eval_problems["test"]]
    assert all(p.is_correct(p.answer.rpartition("#### ")[2]) for p in problems)
    assert generated.answers() == [p.answer for part in generated.eval_problems.values() for p in part]


def test_the_old_name_of_files_warns(folder):
    write(folder / "a.jsonl", [{"question": f"{i}?", "answer": i} for i in range(20)])
    with pytest.warns(FutureWarning, match="data.source 'jsonl' is now named 'file'"):
        old = WordProblems("jsonl", "a.jsonl")
    old.setup("fit")
    assert len(old.train_problems) == 17


WRONG = {
    "a.csv": (
        "Body,answer\nHow many?,9\n",
        r"^'a.csv' \(data.path\) holds no problem: first line 2 \(there is no 'question', ",
    ),
    "near.json": (
        '[{"quest": "?", "answer": 1}]',
        r"only 'quest', 'answer': set data.columns.question, did you mean 'q",
    ),
    "b.csv": ("question,answer\n1?\n2?,2,3\n", r"first line 2 \(cells: 1, columns: 2\)"),
    "c.csv": ("question,answer\n", "it is empty"),
    "d.csv": ("", "it is empty"),
    "e.csv": ("question,answer,answer\n", r"^'e.csv' \(data.path\) has the column 'answer' twice$"),
    "f.csv": ("question;answer\n1?;one\n", r"first line 2 \(the answer 'one' is no number, and has no '####'\)"),
    "g.csv": ('question,answer\n"' + "1" * 200_000, r"first line 2 \(field larger than field limit"),
    "long.csv": (
        "question," + "a" * 200_000,
        r"^'long.csv' \(data.path\) has no header that can be read: field",
    ),
    "blank.csv": ("\n\nquestion;answer\n1?;one\n", r"first line 4 \(the answer 'one' is no number"),
    "g.json": ('[{"question": "1?"},', r"^'g.json' \(data.path\) is not valid JSON: "),
    "h.json": ('{"data": []}', r"first line 1 \(there is no 'question', only 'data': set data.columns.question\)"),
    "i.json": ("[]", "it is empty"),
    "j.json": ('[{"question": "1?", "answer": [1, 2]}]', r"\('answer' is no text, but \[1, 2\]\)"),
    "k.json": ('[{"question": "1?", "answer": NaN}]', "the answer 'nan' is no number"),
    "l.json": ('[{"question": "1?", "answer": true}]', r"\('answer' is no text, but True\)"),
    "m.json": ('[{"question": "1?", "answer": null}]', r"\('answer' is empty\)"),
    "n.parquet": ("PAR1", r"^data.path: cannot read 'n.parquet' as parquet: "),
    "o.xlsx": ("PK\3\4", r"^'o.xlsx' \(data.path\) is compressed \(zip\): save it as .csv$"),
}


@pytest.mark.parametrize("name", WRONG)
def test_data_that_cannot_be_used(folder, name):
    content, reason = WRONG[name]
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        WordProblems("file", name).setup("fit")
    assert "\n" not in str(caught.value)


def test_damaged_and_other_folders(folder):
    (folder / "other").mkdir()
    with pytest.raises(UserError, match=r"'other': it is a folder that save_to_disk did not write, name a file$"):
        WordProblems("file", "other").setup("fit")
    for damaged in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        path = write(folder / damaged.partition(".")[0], MAWPS)
        (path / damaged).write_text("{")
        with pytest.raises(
            UserError, match=f"^data.test_path: cannot read '{path.name}' as a saved data set: "
        ) as caught:
            WordProblems("file", test_path=path.name).setup("test")
        assert "\n" not in str(caught.value)
    assert len(load_from_disk(write(folder / "good", MAWPS))) == 20


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"columns": {"questoin": "a"}, "source": "hub"},
            "data.columns has no 'questoin': its keys are 'question' and",
        ),
        ({"columns": {"question": []}, "source": "hub"}, "data.columns.question names no column"),
        ({"columns": {"answer": ["a", "b"]}, "source": "hub"}, "data.columns.answer must be one column"),
        ({"columns": {"question": "a"}}, "data.columns is not read with data.source 'generated'"),
        ({"splits": {"tets": "a"}, "source": "hub"}, "data.splits has no 'tets'"),
        ({"splits": {}, "source": "hub"}, "data.splits needs a name for 'train'"),
        ({"test_path": "a", "source": "hub"}, "data.test_path is read with data.source 'file' only, set data.splits"),
        ({"hub_config": "a", "source": "file", "path": "a"}, "data.hub_config is read with data.source 'hub' only"),
        ({"answer_format": "gsm"}, "data.answer_format 'gsm' has 0 groups"),
    ],
)
def test_settings_that_contradict_each_other(options, reason):
    with pytest.raises(UserError, match=reason):
        WordProblems(**options)


def test_held_out_problems_that_are_trained_on_are_told(folder, recwarn):
    rows = [{"question": f"{i}?", "answer": i} for i in range(40)]
    write(folder / "a.jsonl", rows)
    WordProblems("file", "a.jsonl").setup("fit")
    assert not [str(one.message) for one in recwarn if "training problems too" in str(one.message)]
    with pytest.warns(UserWarning, match=r"^data: 36 of 40 test problems are training problems too$"):
        WordProblems("file", "a.jsonl", "a.jsonl").setup("fit")
    write(folder / "b.jsonl", [*rows[:39], rows[0]])  # a row twice: at the beginning and among the test problems
    with pytest.warns(UserWarning, match=r"^data: 1 of 4 test problems are training problems too$"):
        WordProblems("file", "b.jsonl").setup("fit")


def test_splits_of_a_file(folder):
    write(folder / "a.jsonl", [{"question": f"{i}?", "answer": i} for i in range(20)])
    with pytest.raises(UserError, match=r"data.splits goes with hub data sets and saved ones .*, not 'a.jsonl'"):
        WordProblems("file", "a.jsonl", splits={"test": "a"}).setup("test")


@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv"])
def test_a_compressed_file_and_another_encoding_are_told(folder, form):
    text = write(folder / f"train{form}", MAWPS).read_text()
    packed, wide = folder / f"train{form}.gz", folder / f"wide{form}"
    packed.write_bytes(gzip.compress(text.encode()))
    wide.write_text(text, encoding="utf-16")
    options = {"columns": {"question": "sQuestion", "answer": "lSolutions"}}
    with pytest.raises(UserError, match=r"gz' \(data\.path\) is compressed \(gzip\): unpack it first$"):
        WordProblems("file", str(packed), **options).setup("fit")
    with pytest.raises(UserError, match=r"' \(data\.path\) is a text in UTF-16 or UTF-32: save it in UTF-8$"):
        WordProblems("file", str(wide), **options).setup("fit")
