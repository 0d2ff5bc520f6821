"""What the models read: every character once, as the tokenizer writes the whole text; the packing of rows."""

import pytest
import tokenizers_of_kinds as kinds
import torch
from conftest import ROOT

from datamodules.errors import UserError
from datamodules.problems import Problem, generate_passkey
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.prompts import Prompt, check_tokens, continued
from lightning_modules.telepathy.layout import Row, pack
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target

PROMPTS = ["Question: {question}\nAnswer:", "{question}", "Q:{question} A: ", "<s>[INST] {question} [/INST]", "chat"]
ODD = [
    Problem("12 of 345?", "3\n#### 3"),
    Problem("Zoë’s café sells 2½ “pies” — why?", "→ 2\n\n#### 2"),
    Problem(": T is 3?\n", "####"),
]
KINDS = {"pair": None, "llama_3": kinds.llama_3, "qwen": kinds.qwen, "sentencepiece": kinds.sentencepiece}


@pytest.fixture(scope="module", params=[*KINDS, "wordpiece"])
def folder(request, tmp_path_factory) -> str:
    """Return a folder with a tokenizer of a kind."""
    if request.param == "pair":
        return str(ROOT / "assets" / "pair" / "target")
    path = tmp_path_factory.mktemp(request.param)
    getattr(kinds, request.param)().save_pretrained(path)
    return str(path)


def model(which: str, tokenizer: str) -> Pretrained:
    return Pretrained(str(ROOT / "assets" / "pair" / which), tokenizer=tokenizer)


def texts(problems) -> tuple[list[str], list[str]]:
    whole = [*problems, *ODD, generate_passkey(0, "train", 0)]
    return [p.question for p in whole], [p.answer for p in whole]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_row_of_the_target_is_the_tokenizers_whole_text(folder, problems, prompt):
    target_model = model("target", folder)
    tokenizer, (questions, answers) = target_model.load_tokenizer(), texts(problems)
    if prompt == "chat" and not tokenizer.chat_template:
        with pytest.raises(UserError, match="has no chat template, write a prompt"):
            Target(target_model, prompt)
        return
    target = Target(target_model, prompt)
    end = 2 if tokenizer.eos_token_id is None else tokenizer.eos_token_id  # the model's, where the tokenizer has none
    soft_rows, text_rows = target.rows.soft(questions, answers), target.rows.text(questions, answers)
    for question, answer, row, soft in zip(questions, answers, text_rows, soft_rows, strict=True):
        if prompt == "chat":
            filled, first = target.prompt.fill(question), []
            message = [{"role": "user", "content": question}]
            assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == filled
            whole = tokenizer(filled + answer, add_special_tokens=False)["input_ids"]
        else:
            filled = prompt.rstrip(" ").replace("{question}", question)
            whole = tokenizer(f"{filled} {answer}", add_special_tokens=False)["input_ids"]
            first = [] if tokenizer.bos_token_id in (None, whole[0]) else [tokenizer.bos_token_id]
            first = tokenizer("x")["input_ids"][:1] if tokenizer.cls_token else first
        assert row.prompt + row.answer == [*first, *whole, end]
        assert soft.answer == row.answer
        before = soft.prompt[: soft.place]  # what comes before the question's first token, or before an empty prompt
        assert before == row.prompt[: row.place] or (soft.prompt, row.place) == ([end], 0)
    stop = {"Question: {question}\nAnswer:": "Question:", "Q:{question} A: ": "Q:", PROMPTS[3]: "<s>[INST]"}
    assert target.prompt.stop == stop.get(prompt)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_source_reads_every_character_of_the_question(folder, problems, prompt):
    source, (questions, _) = Source(model("source", folder), [1], prompt), texts(problems)
    tokenizer, batch = source.tokenizer, source.tokenize(questions)
    for question, tokens_T, real_T, place_S, mask_S in zip(
        questions, *(batch[key] for key in ("source", "source_real", "source_place", "source_mask")), strict=True
    ):
        whole = tokens_T[real_T].tolist()
        if prompt == "chat" and tokenizer.chat_template:
            assert whole == tokenizer(f"<|im_start|>user\n{question}", add_special_tokens=False)["input_ids"]
        else:
            before = "" if prompt == "chat" else prompt.partition("{question}")[0]
            written = tokenizer(before + question)["input_ids"]
            if tokenizer.bos_token_id is not None and written[0] != tokenizer.bos_token_id:
                written = [tokenizer.bos_token_id, *written]
            assert whole == (written[1:] if written[:2] == [tokenizer.bos_token_id] * 2 else written)
        read = tokens_T[place_S[mask_S]].tolist()
        alone = tokenizer(question, add_special_tokens=False)["input_ids"]
        wanted, got = ("".join(tokenizer.decode(tokens).split()) for tokens in (alone, read))
        assert got.endswith(wanted)
        assert tokenizer.sep_token_id is None or tokenizer.sep_token_id not in read


def test_packing_leaves_no_holes_and_asks_for_the_answers():
    generator = torch.Generator().manual_seed(0)
    mask_BK = torch.rand(6, 9, generator=generator) < 0.6  # holes anywhere, as before the end vector of a TokenBridge
    mask_BK[0], mask_BK[1] = True, False
    rows = [Row([*range(2000, 2004 + i)], i % 3, [100 * i + j for j in range(1, 2 + i)]) for i in range(6)]
    packing, seen, lengths = pack(rows, 7, mask_BK), 0, []
    for row, mask_K, tokens_T, column_T in zip(rows, mask_BK, packing.tokens_BT, packing.column_BT, strict=True):
        vectors = mask_K.nonzero()[:, 0].tolist()
        wanted = [*row.prompt[: row.place], *[7] * len(vectors), *row.prompt[row.place :], *row.answer[:-1]]
        assert tokens_T.tolist() == wanted + [7] * (len(tokens_T) - len(wanted))
        assert column_T[row.place : row.place + len(vectors)].tolist() == vectors
        assert (column_T >= 0).sum() == len(vectors)
        start = len(lengths) * len(tokens_T) + len(wanted) - len(row.answer)
        assert packing.labels_N[seen : seen + len(row.answer)].tolist() == row.answer
        assert packing.predict_N[seen : seen + len(row.answer)].tolist() == [start + i for i in range(len(row.answer))]
        lengths.append(len(wanted))
        seen += len(row.answer)
    assert packing.tokens_BT.shape[1] == max(lengths)
    assert seen == len(packing.labels_N)


def test_a_row_beyond_the_models_positions_is_refused(telepathy, problems):
    module, long = telepathy(), Problem("How many? " * 2000, "1\n#### 1")
    with pytest.raises(UserError, match=r"takes \d+ positions with its prompt, and '.*source' has \d+$"):
        module.collate([long], False)
    rows = module.target.rows.text([long.question], [long.answer])
    with pytest.raises(UserError, match=r"a row takes \d+ positions, and '.*target' has \d+$"):
        module.target.losses(rows)
    rows = module.target.rows.text([problems[0].question], [problems[0].answer])
    with pytest.raises(UserError, match=r"60000 of them for the answer \(model.max_new_tokens\), and '.*target' has"):
        module.target.answers(rows, 60000)


def test_the_bos_is_first_and_once_but_in_the_notes(telepathy, problems):
    def rows(**options) -> tuple[Row, Row]:
        target, texts = telepathy(**options).target, ([problems[0].question], [problems[0].answer])
        return target.rows.soft(*texts)[0], target.rows.text(*texts)[0]

    row, text_row = rows()
    assert (row.prompt[0], row.prompt.count(1), text_row.prompt.count(1)) == (1, 1, 1)
    assert rows(reproduce_flaws=["key_scale"]) == (row, text_row)
    for flaws in (["bos_behind"], True):
        notes, notes_text = rows(reproduce_flaws=flaws)
        assert (notes.prompt, notes.place, notes_text) == ([1], 0, text_row)


def test_a_limit_of_answers_beyond_the_positions_of_the_target_is_told_at_once(telepathy):
    positions = telepathy().target.positions
    with pytest.raises(UserError, match=rf"model.max_new_tokens must be below {positions}, the positions of"):
        telepathy(max_new_tokens=positions)
    with pytest.raises(UserError, match=r"model.max_new_tokens must be at least 1, not 0"):
        telepathy(max_new_tokens=0)
    telepathy(max_new_tokens=positions - 1)


@pytest.mark.parametrize(
    ("template", "stop", "separator"),
    [
        ("Question: {question}\nAnswer:", "Question:", " "),
        ("Be brief.\n[INST] {question} [/INST]\n", "[INST]", ""),  # behind white space there is no other one
        ("Solve this {question} A:  ", None, "  "),
        ("## {question}", None, " "),
    ],
)
def test_where_an_answer_stops_and_what_stands_before_it(template, stop, separator):
    prompt = Prompt(template)
    assert (prompt.stop, prompt.separator) == (stop, separator)


def test_a_chat_template_has_its_special_tokens_and_no_stop_text(tmp_path):
    tokenizer = kinds.llama_3()
    tokenizer.chat_template = "[INST] {{ messages[0].content }} [/INST]"
    tokenizer.save_pretrained(tmp_path)
    source, target = Source(model("source", str(tmp_path)), [1], "chat"), Target(model("target", str(tmp_path)), "chat")
    assert target.prompt.stop is None
    assert tokenizer.bos_token_id not in {source.tokenize(["x"])["source"][0, 0].item(), target.rows.head[0]}


def test_no_character_between_two_texts_is_lost():
    tokenizer = kinds.llama_3()  # `?` and a line break are one token of it
    ((first, second),) = continued(tokenizer, ["Why?"], ["\nA: so"])
    assert tokenizer.decode(first + second) == "Why?\nA: so"
    assert len(tokenizer("?\n", add_special_tokens=False)["input_ids"]) == 1


def test_the_largest_token_of_a_model():
    check_tokens([[4], [0]], 5, "model.target", "x")
    with pytest.raises(UserError, match="writes token 5, and 'x' has tokens 0 to 4 only"):
        check_tokens([[4], [5]], 5, "model.target", "x")


def test_the_rows_that_a_source_reads(telepathy):
    source, questions = telepathy(source_prompt="{question}").source, ["How many?", "How many cups?"]
    with pytest.raises(UserError, match="has no token for ''"):
        source.tokens([""])
    longest = source.positions = source.tokens(questions)["source"].shape[1]
    source.tokenizer.add_special_tokens({"pad_token": "<new>"})  # a token that the model lacks
    assert source.tokens(questions)["source"].max() < len(source.model.model.embed_tokens.weight)
    source.positions = longest - 1
    with pytest.raises(UserError, match=r"'How many cups\?'\.\.\. takes \d+ positions with its prompt"):
        source.tokens(questions)
    source.positions = None
    source.tokenizer.add_tokens(["cups"])
    with pytest.raises(UserError, match=r"^model.source: the tokenizer writes token \d+, and .* 0 to \d+ only"):
        source.tokens(questions)
