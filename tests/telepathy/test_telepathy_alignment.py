"""Target tokens at the soft tokens of the source token in which they begin."""

from functools import partial

import pytest
import torch

from lightning_modules.telepathy import FlowBridge
from lightning_modules.telepathy.alignment import slots, tokens_and_ends

FLOW = partial(FlowBridge, soft_tokens=90, tokens_per_query=3, span=30, width=16, heads=2, steps=2)


@pytest.mark.parametrize(
    ("target_ends", "source_ends", "places", "found"),
    [
        ([2, 4, 5, 9], [4, 9], [0, 0, 1, 1], [0, 1, 2, 3]),
        (
            [1, 2, 3, 9],
            [4, 9],
            [0, 0, 1, 1],
            [0, 1, -1, -1],
        ),  # the third one finds no place, the fourth begins before 4
        ([9], [4, 9], [0, 0, 1, 1], [0, -1, -1, -1]),  # a token that spans two belongs to the first
        ([2, 4, 6, 9], [2, 4, 6, 9], [0, 0, 2, 2], [0, 1, 2, 3]),  # fewer places than source tokens
        ([2, 4, 6], [2, 4, 6], [0, 1], [0, 1]),  # the question is longer than the places
    ],
)
def test_target_tokens_take_the_soft_tokens_of_their_source_token(target_ends, source_ends, places, found):
    assert slots(target_ends, source_ends, places) == found


def test_ends_count_the_characters_of_the_question(telepathy, problems):
    module, questions = telepathy(FLOW), [problem.question for problem in problems[:8]]
    for end, before in ((module.source, module.source.before), (module.target, module.target.prompt.before)):
        for row, question in zip(tokens_and_ends(end.tokenizer, before, questions)[1], questions, strict=True):
            assert row == sorted(row)
            assert row[-1] == len(question)


def test_the_flow_takes_each_soft_token_to_a_token_of_its_source_token(telepathy, problems):
    module = telepathy(FLOW, objectives={"flow": {"weight": 1.0, "text": "aligned"}})
    batch, positions = module.collate(problems[:8], True), module.bridge.positions().tolist()
    assert (batch["aligned_mask"] <= batch["soft_mask"]).all()
    pieces = module.source.tokenizer.convert_ids_to_tokens
    for row, problem in enumerate(problems[:8]):
        source = batch["source"][row][batch["source_place"][row][batch["source_mask"][row]]].tolist()
        for k in batch["aligned_mask"][row].nonzero()[:, 0].tolist():
            token = module.target.tokenizer.decode([int(batch["aligned"][row, k])]).strip()
            following = "".join(pieces(source[positions[k] : positions[k] + 2])).replace("\u0120", " ")
            assert token in following, (problem.question, token, following)
    kept = batch["aligned_mask"].sum(1) / torch.tensor(
        [len(t) for t in module.target.rows.question_tokens([p.question for p in problems[:8]])]
    )
    assert kept.min() > 0.7


def test_tokenizers_without_offsets_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="needs fast tokenizers"):
        tokens_and_ends(Slow(), "", ["a"])
