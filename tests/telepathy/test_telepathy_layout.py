"""The layout of tokens: cuts at the seams of the prompt, packing, and the target that reads embeddings."""

import pytest
import torch

from datamodules.problems import Problem, generate_passkey
from lightning_modules.pretrained.prompts import Prompt, encode
from lightning_modules.telepathy.layout import cut, pack
from lightning_modules.telepathy.target import Frame

PROMPTS = ["Question: {question}\nAnswer:", "{question}", "Read this. {question} =>", "[INST] {question} [/INST]"]
ODD = [
    Problem("12 of 345?", "3\n#### 3"),
    Problem("Zoë’s café sells 2½ “pies” — why?", "→ 2\n\n#### 2"),
    Problem("x", "####"),
]


@pytest.fixture(scope="module")
def module(telepathy):
    return telepathy(objectives={"lm": 1.0, "kl_text": 1.0}).eval()


@pytest.fixture(scope="module", params=["source", "target"])
def tokenizer(module, request):
    return module.source_tokenizer if request.param == "source" else module.target.tokenizer


@pytest.mark.parametrize("template", PROMPTS)
def test_the_pieces_of_a_text_are_its_tokens_and_its_parts(tokenizer, problems, template):
    prompt, texts = Prompt(template), [*problems, *ODD, generate_passkey(0, "train", 0)]
    questions, answers = [p.question for p in texts], [p.answer for p in texts]
    whole = encode(tokenizer, [f"{prompt.fill(q)} {a}" for q, a in zip(questions, answers, strict=True)])
    for row, tokens, question, answer in zip(
        cut(tokenizer, prompt, questions, answers), whole, questions, answers, strict=True
    ):
        assert row.before + row.question + row.after + row.answer == tokens
        parts = [tokenizer.decode(part) for part in (row.before, row.question, row.after, row.answer)]
        assert [part.strip() for part in parts] == [prompt.before.strip(), question, prompt.after.strip(), answer]


def test_the_target_sees_the_same_prompt_in_training_as_in_generation(module, problems):
    target, frame = module.target, module.target.text_frame
    for row, problem in zip(module.collate(problems, True)["text"], problems, strict=True):
        question = row[: len(row)].tolist()
        while question[-1] == 0:
            question.pop()
        (alone,) = encode(target.tokenizer, [module.prompt.fill(problem.question)])
        assert frame.head + question + frame.after == [target.tokenizer.bos_token_id, *alone]


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("after", [[], [901, 902]])
def test_packing_leaves_no_holes_and_asks_for_the_answers(head, after):
    generator = torch.Generator().manual_seed(0)
    mask_BK = torch.rand(6, 9, generator=generator) < 0.6  # holes anywhere, as before the end vector of a TokenBridge
    mask_BK[0], mask_BK[1] = True, False
    answers = [[100 * row + i for i in range(1, 2 + row)] for row in range(6)]
    tail_BA, packing = pack(head, mask_BK, after, answers)
    body_BK = 1000 + torch.arange(54).reshape(6, 9)
    parts_BL = torch.cat([torch.arange(2000, 2000 + head).expand(6, -1), body_BK, tail_BA], dim=1)
    packed_BT = parts_BL.gather(1, packing.order_BT)
    lengths, seen = [], 0
    for row, mask_K, body_K, answer in zip(packed_BT.tolist(), mask_BK, body_BK, answers, strict=True):
        wanted = [*range(2000, 2000 + head), *body_K[mask_K].tolist(), *after, *answer]
        assert row[: len(wanted)] == wanted
        start = len(lengths) * packed_BT.shape[1] + len(wanted) - len(answer)
        assert packing.labels_N[seen : seen + len(answer)].tolist() == answer
        assert packing.predict_N[seen : seen + len(answer)].tolist() == [start - 1 + i for i in range(len(answer))]
        lengths.append(len(wanted))
        seen += len(answer)
    assert packed_BT.shape[1] == max(lengths)
    assert seen == len(packing.labels_N)


@torch.no_grad()
def test_question_embeddings_through_the_bridges_way_give_the_logits_of_the_text(module, problems):
    target, batch = module.target, module.collate(problems, True)
    body_BQD = target.embedding(batch["text"])
    logits_NV = target.logits(target.text_frame, body_BQD, batch["text_tail"], batch["text_packing"])
    plain, labels = [], []
    for problem in problems:
        prompt, whole = encode(
            target.tokenizer,
            [module.prompt.fill(problem.question), f"{module.prompt.fill(problem.question)} {problem.answer}"],
        )
        tokens = [target.tokenizer.bos_token_id, *whole, target.tokenizer.eos_token_id]
        plain.append(target.model(torch.tensor([tokens])).logits[0, len(prompt) : -1])
        labels += tokens[len(prompt) + 1 :]
    assert batch["text_packing"].labels_N.tolist() == labels
    torch.testing.assert_close(logits_NV, torch.cat(plain), atol=1e-5, rtol=1e-5)
    losses = target.answer_losses(
        target.text_frame, body_BQD, batch["text_mask"], module.collate(problems, False)["answers"]
    )
    for losses_A, logits_AV, problem in zip(losses, plain, problems, strict=True):
        labels_A, labels = torch.tensor(labels[: len(losses_A)]), labels[len(losses_A) :]
        expected_A = torch.nn.functional.cross_entropy(logits_AV, labels_A, reduction="none")
        assert losses_A == pytest.approx(expected_A, abs=1e-4), problem


@torch.no_grad()
def test_question_embeddings_through_the_bridges_way_give_the_answers_of_the_text(module, problems):
    target, batch = module.target, module.collate(problems, False)
    outputs = target.answer(target.text_frame, target.embedding(batch["text"]), batch["text_mask"], 100)
    plain = []
    for problem in problems:
        (prompt,) = encode(target.tokenizer, [module.prompt.fill(problem.question)])
        tokens_BT = torch.tensor([[target.tokenizer.bos_token_id, *prompt]])
        made_BT = target.model.generate(
            tokens_BT, attention_mask=torch.ones_like(tokens_BT), max_new_tokens=100, do_sample=False
        )
        plain.append(target.tokenizer.decode(made_BT[0, tokens_BT.shape[1] :], skip_special_tokens=True).strip())
    assert outputs == plain
    assert sum(p.is_correct(output) for p, output in zip(problems, outputs, strict=True)) >= 15


@torch.no_grad()
def test_a_batch_is_answered_as_its_rows_one_by_one(module, problems):
    target, batch = module.target, module.collate(problems, False)
    soft_BKD, mask_BK = module(batch), batch["soft_mask"]
    assert mask_BK.sum(1).unique().numel() > 3
    together = target.answer(target.soft_frame, soft_BKD, mask_BK, 30)
    alone = [target.answer(target.soft_frame, soft_BKD[i : i + 1], mask_BK[i : i + 1], 30)[0] for i in range(16)]
    cropped = [
        target.answer(target.soft_frame, soft_KD[mask_K][None], mask_K[mask_K][None], 30)[0]
        for soft_KD, mask_K in zip(soft_BKD, mask_BK, strict=True)
    ]
    assert together == alone == cropped


@torch.no_grad()
def test_a_prompt_that_ends_in_padding_is_answered_as_its_rows_one_by_one(module, problems):
    target, batch = module.target, module.collate(problems[:6], False)
    frame, body_BQD, mask_BQ = Frame(target.text_frame.head, []), target.embedding(batch["text"]), batch["text_mask"]
    assert not mask_BQ[:, -1].all()
    rows = zip(body_BQD, mask_BQ, strict=True)
    alone = [target.answer(frame, body_QD[mask_Q][None], mask_Q[mask_Q][None], 12)[0] for body_QD, mask_Q in rows]
    assert target.answer(frame, body_BQD, mask_BQ, 12) == alone


@torch.no_grad()
def test_the_bos_is_first_and_once_but_in_the_notes(module, telepathy, problems):
    bos = module.target.tokenizer.bos_token_id
    assert module.target.soft_frame == module.target.text_frame
    assert (module.target.soft_frame.head[0], bos in module.target.soft_frame.after) == (bos, False)
    assert telepathy(reproduce_flaws=["key_scale"]).target.soft_frame == module.target.soft_frame
    notes = telepathy(reproduce_flaws=["bos_behind"])
    assert telepathy(reproduce_flaws=True).target.soft_frame == notes.target.soft_frame
    assert (notes.target.soft_frame.head, notes.target.soft_frame.after) == ([], [bos])
    batch = notes.collate(problems, True)
    assert (batch["soft_tail"][:, 0] == bos).all()
    assert (batch["soft_packing"].order_BT[:, 0] == 0).all()  # the first soft token, nothing before it
    assert notes.target.text_frame == module.target.text_frame
