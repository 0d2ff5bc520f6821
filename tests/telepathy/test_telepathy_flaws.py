"""The flaws of the notes in the target's rows, in labels and in the output."""

import pytest
import torch

from datamodules.errors import UserError
from lightning_modules.telepathy.flaws import LOUD, PRIMER


def text_of(module, row) -> str:
    return module.target.tokenizer.decode(row.prompt[: row.place] + row.prompt[row.place :])


def rows_of(module, problems, training: bool):
    texts = [problem.question for problem in problems], [problem.answer for problem in problems]
    return module.target.rows.soft(*texts, training=training)


def test_a_sound_target_is_asked_as_it_was_trained(telepathy, problems):
    module = telepathy()
    assert rows_of(module, problems, True) == rows_of(module, problems, False)


def test_another_primer_in_evaluation_alone(telepathy, problems):
    module = telepathy(reproduce_flaws=["primer_mismatch"])
    trained, asked = rows_of(module, problems, True)[0], rows_of(module, problems, False)[0]
    assert text_of(module, trained) == "<s>Question:\nAnswer:"
    assert text_of(module, asked) == f"<s>{PRIMER.rstrip()}\nAnswer:"
    assert module.collate(problems, False)["soft_rows"][0] == asked


def test_no_bos_in_evaluation_alone(telepathy, problems):
    module = telepathy(reproduce_flaws=["missing_bos"])
    trained, asked = rows_of(module, problems, True)[0], rows_of(module, problems, False)[0]
    assert trained.prompt[0] == module.target.tokenizer.bos_token_id
    assert (asked.prompt, asked.place) == (trained.prompt[1:], trained.place - 1)


def test_padding_in_the_labels(telepathy, problems):
    sound, flawed = (telepathy(reproduce_flaws=flaws) for flaws in ([], ["padding_labels"]))
    lengths = [len(row.answer) for row in rows_of(sound, problems, True)]
    assert len(sound.collate(problems, True)["soft"].labels_N) == sum(lengths)
    labels_BN = flawed.collate(problems, True)["soft"].labels_N.view(len(problems), max(lengths))
    end = flawed.target.tokenizer.eos_token_id
    assert [int((row_N == end).sum()) for row_N in labels_BN] == [max(lengths) - n + 1 for n in lengths]


def test_output_that_is_loud_or_bounded(telepathy):
    sound, loud, bounded = (telepathy(reproduce_flaws=f) for f in ([], ["loud_output"], ["saturating_tanh"]))
    x_BKD, mask_BK = 50 * torch.randn(2, 3, sound.target.width), torch.ones(2, 3, dtype=torch.bool)
    sizes = [module.soft_tokens(x_BKD, mask_BK).square().mean().sqrt().item() for module in (sound, loud, bounded)]
    assert sizes == pytest.approx([sound.scale, LOUD * sound.scale, sound.scale], rel=0.02)
    x_BKD.requires_grad_()
    for module, is_saturated in ((sound, False), (bounded, True)):
        (grad_BKD,) = torch.autograd.grad(module.soft_tokens(x_BKD, mask_BK)[..., 0].sum(), x_BKD)
        assert ((grad_BKD == 0).float().mean() > 0.9) == is_saturated


def test_a_flaw_that_changes_no_prompt_is_refused(telepathy):
    with pytest.raises(UserError, match="primer_mismatch would change nothing in the prompt of this target"):
        telepathy(reproduce_flaws=["bos_behind", "primer_mismatch"])
