"""Where an answer ends, and whether the length limit has cut it."""

from types import SimpleNamespace

import pytest
import torch

from lightning_modules.pretrained.answers import Answer, answers_of, have_ended, written

WORDS = ["<end>", " 7", "\nQ:", " IQ:", " x", "[Q]"]
END, SEVEN, STOP, INNER, OTHER, MARKS = range(6)


class Words:
    """A tokenizer whose tokens are words; the model has tokens behind its last one."""

    def __len__(self):
        return len(WORDS)

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(WORDS[token] for token in row if token) for row in rows]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ([SEVEN, END, OTHER], Answer("7", False)),
        ([SEVEN, OTHER, OTHER], Answer("7 x x", True)),
        ([SEVEN, OTHER, STOP], Answer("7 x", False)),  # the stop text at the limit ends it too
        ([SEVEN, INNER, OTHER], Answer("7 IQ: x", True)),  # within a word it is no stop text
        ([SEVEN, len(WORDS), END], Answer("7", False)),  # a token that only the model has
        ([END, SEVEN, STOP], Answer("", False)),
    ],
)
def test_ends(row, answer):
    assert answers_of(Words(), [row], [END], "Q:", 3) == [answer]
    ended = have_ended(Words(), [END], "Q:", torch.tensor([row]))
    assert ended.item() is not answer.is_cut


def test_a_stop_text_of_marks_may_follow_a_word_and_is_no_pattern():
    rows = torch.tensor([[SEVEN, MARKS, OTHER], [SEVEN, STOP, OTHER]])
    assert have_ended(Words(), [END], "[Q]", rows).tolist() == [True, False]
    assert answers_of(Words(), rows.tolist(), [END], "[Q]", 3) == [Answer("7", False), Answer("7\nQ: x", True)]


def test_without_a_stop_text_only_end_tokens_count():
    rows = torch.tensor([[SEVEN, STOP, OTHER], [SEVEN, STOP, END]])
    assert have_ended(SimpleNamespace(), [END], None, rows).tolist() == [False, True]


@pytest.mark.parametrize(
    ("stop", "wanted"), [("<s>[INST]", "[INST]"), ("<s> Q:", "Q:"), ("Q:", "Q:"), ("<user>:", None), (None, None)]
)
def test_a_stop_text_has_no_special_tokens_as_an_answer_has_none(stop, wanted):
    assert written(SimpleNamespace(all_special_tokens=["<s>", "<user>"]), stop) == wanted
