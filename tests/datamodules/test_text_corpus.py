"""TextCorpus: sources, levels, the parts of the text, windows, user errors."""

import json
from itertools import pairwise
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import QUIET
from lightning import Trainer

from datamodules import TextCorpus
from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.phase import Phase

SMALL = {"seq_len": 8, "batch_size": 4, "epoch_size": 40, "validation_size": 6, "test_size": 6, "seed": 1}


def numbered(count):
    return "".join(f"{i:05d}," for i in range(count))  # every window of it occurs once


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(numbered(1000), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("level", ["byte", "char", "bpe"])
def test_windows_of_each_part_lie_in_it_and_held_out_ones_do_not_overlap(file, level):
    data = TextCorpus("file", file, level=level, bpe_vocab=300, **SMALL)
    data.setup("fit")
    text = numbered(1000)
    rows = {"train": data.draw(np.random.default_rng(0), 50), "validation": data.fixed("validation", 6)}
    rows["test"] = data.fixed("test", 6)
    bounds = {"train": (0, 5400), "validation": (5400, 5700), "test": (5700, 6000)}
    for part, (start, end) in bounds.items():
        tokens, labels = rows[part].swapaxes(0, 1)
        assert np.array_equal(tokens[:, 1:], labels[:, :-1])
        assert labels.min() >= 0
        assert max(tokens.max(), labels.max()) < data.vocab_size
        windows = [data.decode([*row, label[-1]]) for row, label in zip(tokens, labels, strict=True)]
        places = [text.index(window) if text.count(window) == 1 else None for window in windows]
        assert None not in places or part == "train" or level == "bpe"
        for window, place in zip(windows, places, strict=True):
            assert window in text[start:end]
            assert place is None or start <= place <= end - len(window)
        if part != "train" and level != "bpe":
            assert len(windows) == 6
            assert all(b - a >= len(windows[0]) for a, b in pairwise(places))
            assert places[0] == start
            assert places[-1] > end - 60  # spread over the part
    assert data.decode(data.parse("00012,")) == "00012,"


def test_training_windows_begin_at_every_place_that_has_room(file):
    data = TextCorpus("file", file, **SMALL)
    (starts,) = data.randomness(np.random.default_rng(0), 200_000)
    assert set(starts.tolist()) == set(range(5400 - 8))
    last = data.rows(np.array([starts.max()]))[0]
    assert data.decode([*last[0], last[1, -1]]) == numbered(1000)[5391:5400]


def test_chance_is_the_most_frequent_token(file):
    data = TextCorpus("file", file, **SMALL)
    train = numbered(1000)[:5400]
    assert data.chance == max(train.count(c) for c in set(train)) / 5400
    assert data.ceiling is None


def test_characters_that_training_does_not_have(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abé\r\n" * 72 + "abö" * 10, encoding="utf-8")
    data = TextCorpus("file", str(path), level="char", **SMALL)
    assert data.vocab_size == 6  # a b é \r \n, and one token for all other characters
    assert data.parse("aböé") == [2, 3, 5, 4]
    assert data.decode([2, 3, 5, 4]) == "ab�é"
    assert [data.token_text(token) for token in range(6)] == ["\\n", "\\r", "a", "b", "é", "�"]


def test_the_split_of_text8_and_enwik8_and_that_of_tinyshakespeare(tmp_path):
    path = tmp_path / "text8"
    path.write_text("".join(chr(97 + i % 26) for i in range(100_000)))
    data = TextCorpus("file", str(path), **SMALL)
    assert [len(data._texts[part]) for part in ("train", "validation", "test")] == [90_000, 5000, 5000]
    assert data._texts["test"] == path.read_bytes()[95_000:]
    data = TextCorpus("file", str(path), split="5/85/10", **SMALL)
    text = path.read_bytes()
    assert data._texts == {"validation": text[:5000], "train": text[5000:90_000], "test": text[90_000:]}


@pytest.mark.parametrize("level", ["byte", "char", "bpe"])
def test_rows_of_any_length_and_tokens_per_character(file, level):
    data = TextCorpus("file", file, level=level, bpe_vocab=280, **SMALL)
    batch = data.text_rows("test", 4, 40)
    assert batch["tokens"].shape == (4, 40)
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert numbered(1000)[5700:].startswith(data.decode(batch["tokens"][0].tolist()))
    rate = data.tokens_per_character("test")
    assert rate == 1 if level != "bpe" else 0.3 < rate < 1
    with pytest.raises(UserError, match=r"the test part of the text has \d+ tokens, and a row of 500 needs 501"):
        data.text_rows("test", 4, 500)


@pytest.mark.parametrize("level", ["byte", "char", "bpe"])
def test_another_text_is_read_with_the_vocabulary_of_a_checkpoint(file, tmp_path, level):
    state = TextCorpus("file", file, level=level, bpe_vocab=280, **SMALL).state_dict()
    (tmp_path / "other.txt").write_text("abc 0123, " * 100)
    data = TextCorpus("file", str(tmp_path / "other.txt"), level=level, bpe_vocab=280, **SMALL)
    data.setup("test")
    data.load_state_dict(state)
    expected = TextCorpus("file", file, level=level, bpe_vocab=280, **SMALL)
    assert data.parse("01,") == expected.parse("01,")
    assert data.vocab_size == expected.vocab_size
    assert data.chance == np.bincount(data._tokens["train"]).max() / len(data._tokens["train"])
    (batch,) = data.test_dataloader()
    assert data.decode(batch["tokens"][0].tolist()).startswith("����0123" if level == "char" else "abc 0")
    assert data.unknown_characters("0a1") == (["a"] if level == "char" else [])
    other = "char" if level == "byte" else "byte"
    with pytest.raises(UserError, match=f"data.level is {other}, and the checkpoint was trained on {level}"):
        TextCorpus("file", file, level=other, **SMALL).load_state_dict(state)


def test_docs_need_no_download_and_a_vocabulary_of_bytes_no_text():
    data = TextCorpus(**SMALL | {"seq_len": 64})
    assert data.vocab_size == 256
    assert "_texts" not in vars(data)
    data.setup("fit")
    assert sum(map(len, data._texts.values())) > 400_000
    assert [data.token_text(token) for token in (65, 10, 200)] == ["A", "\\n", "\\xc8"]
    assert 0.1 < data.chance < 0.3


def test_bpe_compresses_the_text_and_is_deterministic():
    one, other = (TextCorpus(level="bpe", bpe_vocab=400, max_size=40_000, **SMALL) for _ in range(2))
    assert one.vocab_size == 400
    assert one.state_dict() == other.state_dict()
    assert len(one._tokens["train"]) < 0.7 * len(one._texts["train"])
    assert one.decode(one._tokens["test"]) == one._texts["test"]
    assert one.token_text(one.parse("\n")[0]) == "\\n"


@pytest.mark.parametrize("max_size", [None, 60])
def test_a_hub_data_set(monkeypatch, max_size):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return ({"story": f"story {i} " * 4} for i in range(100))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = TextCorpus("hub", "roneneldan/TinyStories", text_column="story", max_size=max_size, **SMALL | {"seq_len": 1})
    assert "story 0 story 0 story 0 story 0 \n\nstory 1 ".startswith(data._texts["train"].decode()[:42])
    assert calls == [("roneneldan/TinyStories", {"split": "train", "streaming": max_size is not None})]
    assert sum(map(len, data._texts.values())) == (max_size or 3758)
    with pytest.raises(ValueError, match=r"has no text in data.text_column 'text': it has \['story'\]"):
        TextCorpus("hub", "x", **SMALL).setup("fit")


def test_inputs_are_texts(file):
    data = TextCorpus("file", file, inputs=["0001", "é"], **SMALL)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["tokens"].tolist() == [[48, 48, 48, 49], [0xC3, 0xA9, 0, 0]]
    assert batch["labels"].tolist() == [[48, 48, 49, IGNORE], [0xA9, IGNORE, IGNORE, IGNORE]]
    data = TextCorpus("file", file, inputs=["000123456"], **SMALL)
    data.setup("predict")
    with pytest.raises(ValueError, match="'000123456' has 9 tokens, not 1 to 8"):
        data.predict_dataloader()


def test_an_ensemble_has_a_crop_for_each_member(file):
    data = TextCorpus("file", file, **SMALL)
    module = SimpleNamespace(ensemble=3)
    data.trainer = SimpleNamespace(
        overfit_batches=0, limit_train_batches=1.0, global_rank=0, world_size=1, lightning_module=module
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == batch["labels"].shape == (3, 4, 8)


@pytest.mark.parametrize(
    ("content", "level", "reason"),
    [
        (b"", "byte", "is empty"),
        (b"", "char", "is empty"),
        (b"aaaa" * 100, "byte", "consists of one character, b'a': there is nothing to predict"),
        ("é".encode() * 100, "char", "consists of one character, 'é'"),
        (b"a", "char", "consists of one character, 'a'"),
        (b"a" * 950 + b"b" * 50, "byte", "the training part of '.*' .data.path. consists of one character, b'a'"),
        (b"ab\0c" * 100, "char", "is not a text, it holds zero bytes; data.level 'byte' takes any file"),
        (b"PK\3\4ab" * 100, "byte", r"is compressed \(zip\): unpack it first"),
        (b"\x1f\x8bab" * 100, "bpe", r"is compressed \(gzip\)"),
        (b"ab\xff" * 100, "char", "is not a text in UTF-8 .*data.level 'byte' takes any file"),
        (b"abcdefgh" * 20, "byte", "its validation part has 8 tokens, and a row of data.seq_len 8 needs 9"),
        (b"abc" * 20, "byte", "its validation part has 3 tokens, and a row of data.seq_len 8 needs 9"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, content, level, reason):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        TextCorpus("file", str(path), level=level, **SMALL).setup("fit")
    assert "\n" not in str(caught.value)
    if b"\xff" in content or b"\0" in content:
        TextCorpus("file", str(path), **SMALL).setup("fit")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no data file at '.*none.txt' \(data.path\)"):
        TextCorpus("file", str(tmp_path / "none.txt")).setup("fit")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"source": "file"}, "data.path goes with data.source 'file' or 'hub'"),
        ({"path": "a.txt"}, "and not with 'docs'"),
        ({"seq_len": 0}, "data.seq_len must be at least 1"),
        ({"max_size": 0}, "data.max_size must be at least 1"),
        ({"bpe_vocab": 255}, "data.bpe_vocab must be at least 256"),
        ({"batch_size": 0}, "data.batch_size"),
    ],
)
def test_user_errors(options, reason):
    with pytest.raises(ValueError, match=reason):
        TextCorpus(**options)


def test_predictions_of_a_model_with_more_tokens_than_the_text(file, tmp_path):
    data = TextCorpus(source="file", path=file, level="char", inputs=["0001"], **SMALL)  # 11 characters, one unknown
    model = Phase(20, 8, width=8, heads=2, pattern="P", seed=0)
    with torch.no_grad():
        model.network.unembed.weight[12:] = 0  # the others get logits of both signs
    Trainer(**QUIET, accelerator="cpu", default_root_dir=tmp_path).predict(model, datamodule=data)
    lines = map(json.loads, (tmp_path / "predictions/positions-0.jsonl").read_text().splitlines())
    likeliest = {token for line in lines for token in line["likeliest"]}
    assert {token for token in likeliest if token.startswith("<")} & {f"<{token}>" for token in range(12, 20)}
    assert likeliest & set("0123456789,")


def test_inputs_of_characters_that_have_no_token_are_refused(file):
    data = TextCorpus("file", file, level="char", inputs=["01", "0a1b"], **SMALL)
    data.setup("predict")
    with pytest.raises(UserError, match=r"data\.inputs: the vocabulary of the model lacks 'a' 'b' of '0a1b'"):
        data.predict_dataloader()
