"""Batches that rows leave once they have ended, against generate of transformers row by row."""

from itertools import pairwise

import pytest
import tokenizers_of_kinds as kinds
import torch
from test_telepathy_models import DECODERS, SIZES
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lightning_modules.pretrained import decoding, generation
from lightning_modules.pretrained.causal_lm import embedding_of, inserted
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.telepathy.target import Target

ROWS, LIMIT = 16, 44
STATIC = ("llama", "mistral", "gemma3_text", "gpt2", "phi3")
MAMBA2 = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}
MINIMAX = {"head_dim": 16, "num_local_experts": 2, "block_size": 8}
RECURRENT = {"attention_window_size": 6, "lru_width": 32}
# States that a second call does not continue; no row may leave
STATES: dict[str, dict] = {"mamba": {}, "mamba2": MAMBA2, "recurrent_gemma": RECURRENT, "minimax": MINIMAX}


def make(name: str):
    """Return a model with random weights, prompts of different lengths, and vectors for two places of each."""
    torch.manual_seed(0)
    options = SIZES | (DECODERS | STATES)[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **options)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else None
    prompts = [torch.randint(22, 512, (5 + i % 4,)).tolist() for i in range(ROWS)]
    columns = [[-1, 0, 1, *[-1] * (len(prompt) - 3)] for prompt in prompts]
    return model, prompts, torch.randn(ROWS, 2, embedding_of(model).width), columns


def one_by_one(model, prompts, vectors_BKD, columns) -> list[list[int]]:
    """Return the tokens that transformers generates for each row without an end."""
    made = []
    for prompt, vectors_KD, column in zip(prompts, vectors_BKD, columns, strict=True):
        tokens_BT = torch.tensor([prompt])
        with inserted(embedding_of(model), vectors_KD[None], torch.tensor([column])):
            options = {"max_new_tokens": LIMIT, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            row = model.generate(tokens_BT, attention_mask=torch.ones_like(tokens_BT), **options)[0, len(prompt) :]
        made.append(row.tolist())
    return made


def cut(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), LIMIT)]


CASES = [(name, "grows") for name in DECODERS | STATES] + [(name, "static") for name in STATIC] + [("llama", "foreign")]


@pytest.mark.parametrize(("name", "cache"), CASES)
def test_each_row_is_what_it_is_alone(monkeypatch, name, cache):
    (model, prompts, vectors_BKD, columns), tokenizer = make(name), kinds.llama_3()
    whole = one_by_one(model, prompts, vectors_BKD, columns)
    # Of three rows in four, a token becomes an end token, so rows end at different places
    ends = {row[3 * i // 2 + 2] for i, row in enumerate(whole) if i % 4}
    model.generation_config.eos_token_id = sorted(ends)
    ends |= {*generation.end_tokens(model, tokenizer)}
    expected = [cut(row, ends) for row in whole]
    assert len({*map(len, expected)}) > 3
    by_length = generation.reads_padding(model, tokenizer)
    assert by_length == (name == "recurrent_gemma")
    assert generation.gives_cache(model, tokenizer) == (name not in STATES)
    if cache == "foreign":  # of a model that has a cache of its own kind
        monkeypatch.setattr(generation, "gives_cache", lambda *_: False)
    sizes, own = [], model.generate

    def watched(**options):
        sizes.append(len(options["input_ids"]))
        return own(**options)

    monkeypatch.setattr(model, "generate", watched)
    monkeypatch.setattr(generation, "answers_of", lambda tokenizer, made, *_: made)
    found = generation.generate(
        model, tokenizer, prompts, LIMIT, None, vectors_BKD, columns, static_cache=cache == "static"
    )
    assert [cut(row, ends) for row in found] == expected
    assert max(map(len, found)) <= LIMIT
    if cache != "grows" or name in STATES:
        assert len(sizes) == (4 if by_length else 1)
    elif not by_length and max(map(len, expected)) > decoding.LOOK + 1:
        assert sizes[0] == ROWS
        assert len(sizes) > 1
        assert all(after <= (1 - decoding.SHARE) * before for before, after in pairwise(sizes))


def test_a_cache_of_another_kind_takes_no_rows():
    class Output:
        cache, past_key_values = [torch.zeros(2)], None

    assert decoding.cache_of(Output()) == {}
    Output.past_key_values = DynamicCache()  # the name in older versions of transformers
    assert decoding.cache_of(Output()) == {"past_key_values": Output.past_key_values}


def test_a_stop_text_ends_a_row_like_an_end_token(telepathy, problems):
    target = telepathy().target
    rows = target.rows.text([problem.question for problem in problems], [problem.answer for problem in problems])
    prompts = [row.prompt for row in rows]
    plain = generation.generate(target.model, target.tokenizer, prompts, 90)
    stopped = generation.generate(target.model, target.tokenizer, prompts, 90, "####")
    assert [answer.text for answer in stopped] == [answer.text.partition("####")[0].strip() for answer in plain]
    assert not any(answer.is_cut for answer in stopped)
    assert all("####" in answer.text for answer in plain)
    stop = f"{target.tokenizer.bos_token}They"  # of which an answer has the word alone
    stopped = generation.generate(target.model, target.tokenizer, prompts, 90, stop)
    assert [answer.text for answer in stopped] == [answer.text.partition("They")[0].strip() for answer in plain]
    assert stopped != plain


def test_a_target_generates_with_a_static_cache(telepathy, problems, monkeypatch):
    plain = telepathy().target
    static = Target(Pretrained(plain.path, static_cache=True), "Question: {question}\nAnswer:")
    seen, own = [], static.model.generate

    def watched(**options):
        output = own(**options)
        seen.append(type(next(iter(decoding.cache_of(output).values()))).__name__)
        return output

    monkeypatch.setattr(static.model, "generate", watched)
    rows = plain.rows.text([problem.question for problem in problems], [problem.answer for problem in problems])
    assert static.answers(rows, 90) == plain.answers(rows, 90)
    assert seen[-1] == "StaticCache"
    assert not any(answer.is_cut for answer in static.answers(rows, 90))
