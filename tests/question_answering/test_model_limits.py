"""Question answering refuses models that cannot read its rows, and trains loaded and new models in one mode."""

from pathlib import Path

import pytest

from datamodules.errors import UserError
from datamodules.problems import generate
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.question_answering import QuestionAnswering

TARGET = str(Path(__file__).parents[2] / "assets" / "pair" / "target")
SMALL = {"n_embd": 32, "n_layer": 1, "n_head": 2, "hidden_size": 32, "intermediate_size": 64}


def new(kind: str, **fields: object) -> QuestionAnswering:
    names = {"gpt2": ("n_embd", "n_layer", "n_head"), "bert": ("hidden_size", "intermediate_size")}[kind]
    size = {name: SMALL[name] for name in names}
    return QuestionAnswering(config={"model_type": kind, **size, **fields}, tokenizer=TARGET)


def test_a_model_that_reads_the_tokens_it_predicts_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.config: bert reads the tokens that it predicts: choose a causal"):
        new("bert", num_hidden_layers=1, num_attention_heads=2)
    causal = new("bert", num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
    causal.tokenizer.save_pretrained(tmp_path)
    causal.model.config.is_decoder = False
    causal.model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.pretrained: '.*' reads the tokens that it predicts"):
        QuestionAnswering(Pretrained(str(tmp_path)))


def test_a_model_type_without_a_causal_model_is_named():
    with pytest.raises(UserError, match=r"^model\.config\.model_type 't5' is no causal language model, such as llama"):
        QuestionAnswering(config={"model_type": "t5"}, tokenizer=TARGET)


def test_rows_longer_than_the_positions_are_refused():
    problems = [generate(0, "train", i) for i in range(4)]
    with pytest.raises(UserError, match=r"max_position_embeddings is 8, and a row takes \d+ positions$"):
        new("gpt2", n_positions=8).collate(problems, training=True)
    module = new("gpt2", n_positions=128).eval()
    batch = module.collate(problems, training=False)
    with pytest.raises(UserError, match=r"takes \d+ positions, 100 of them for the answer \(model\.max_new_tokens\)$"):
        module.sample_eval(batch)
    module.max_new_tokens = 2
    assert len(module.sample_eval(batch)) == 4


def test_tokens_that_the_model_lacks_are_refused():
    module = QuestionAnswering(Pretrained(TARGET))
    module.tokenizer.add_tokens(["apples", "marbles", "coins", "many"])
    with pytest.raises(UserError, match=r"^model\.pretrained: the tokenizer writes token 51\d, and .* 0 to 511 only"):
        module.collate([generate(0, "train", i) for i in range(20)], training=True)


def test_a_padding_token_that_the_model_lacks_is_not_read():
    module = QuestionAnswering(Pretrained(TARGET))
    problems = [generate(0, "train", i) for i in range(4)]
    loss = module.loss(module.collate(problems, training=True))
    module.tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert module.loss(module.collate(problems, training=True)).equal(loss)


def test_loaded_and_new_models_train_in_one_mode(tmp_path):
    module = new("gpt2")
    module.model.save_pretrained(tmp_path)
    module.tokenizer.save_pretrained(tmp_path)
    loaded = QuestionAnswering(Pretrained(str(tmp_path)))
    assert all(part.training for made in (module, loaded) for part in made.modules())
