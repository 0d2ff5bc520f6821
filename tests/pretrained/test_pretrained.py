"""Loading models and tokenizers: whole, in part, with random weights, and the errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2Model

from lightning_modules.pretrained.loading import Pretrained

PAIR = Path(__file__).parents[2] / "assets" / "pair"
LAYERS = {"source": 4, "target": 4}


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(PAIR / "source", tmp_path / "copy"))


def tokens(which: str) -> torch.Tensor:
    tokenizer = Pretrained(str(PAIR / which)).load_tokenizer()
    row = tokenizer.encode("Question: Ann has 12 cups.", add_special_tokens=False)
    return torch.tensor([[tokenizer.bos_token_id, *row]])


@pytest.mark.parametrize("which", LAYERS)
@torch.no_grad()
def test_first_layers_are_the_hidden_states_of_the_whole(which):
    pretrained, tokens_BT = Pretrained(str(PAIR / which)), tokens(which)
    states = pretrained.load_causal_lm()(tokens_BT, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS[which] + 1
    for layers in range(1, LAYERS[which] + 1):
        part = pretrained.load_first_layers(layers)
        assert torch.equal(part(tokens_BT).last_hidden_state, states[layers])
        assert len(part.layers) == layers


@pytest.mark.parametrize("layers", [-1, 0, 7])
def test_a_layer_that_does_not_exist(layers):
    with pytest.raises(ValueError, match=f"source_layer {layers} does not exist: .* has layers 1 to 4"):
        Pretrained(str(PAIR / "source")).load_first_layers(layers)


def test_first_layers_need_a_model_of_llamas_kind(tmp_path):
    GPT2Model(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=2, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(gpt2\) has no final 'norm'"):
        Pretrained(str(tmp_path)).load_first_layers(1)


@torch.no_grad()
def test_random_init_has_the_shapes_and_nothing_else():
    trained = Pretrained(str(PAIR / "source")).load_causal_lm().state_dict()
    torch.manual_seed(0)
    random = Pretrained(str(PAIR / "source"), random_init=True).load_causal_lm().state_dict()
    assert {name: value.shape for name, value in trained.items()} == {n: value.shape for n, value in random.items()}
    assert not any(torch.equal(trained[name], random[name]) for name in trained)
    part = Pretrained(str(PAIR / "source"), random_init=True).load_first_layers(2)
    assert len(part.layers) == 2
    assert isinstance(part.norm, torch.nn.Identity)


def test_dtype():
    model = Pretrained(str(PAIR / "target"), dtype="bfloat16").load_causal_lm()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_sharded_folders_load_and_nothing_is_said(tmp_path, capfd):
    model, tokens_BT = Pretrained(str(PAIR / "source")).load_causal_lm(), tokens("source")
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = Pretrained(str(tmp_path)).load_causal_lm()
    assert torch.equal(again(tokens_BT).logits, model(tokens_BT).logits)
    states = model(tokens_BT, output_hidden_states=True).hidden_states
    part = Pretrained(str(tmp_path)).load_first_layers(2)
    assert torch.equal(part(tokens_BT).last_hidden_state, states[2])
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_without_bos(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"the tokenizer of '.*copy' has no bos_token"):
        Pretrained(str(copy)).load_tokenizer()
    assert Pretrained(str(copy), tokenizer=str(PAIR / "target")).load_tokenizer().bos_token == "<s>"


def test_a_tokenizer_that_cannot_pad_pads_with_its_end(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copy)
    assert Pretrained(str(copy)).load_tokenizer().pad_token == "</s>"


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop_weights, "cannot load a model from '.*copy': .*model.safetensors"),
        (cut_weights, "cannot load a model from '.*copy': "),
        (lambda f: change_config(f, num_hidden_layers=8), "do not fit its config: 36 parameters are missing"),
        (lambda f: change_config(f, hidden_size=48), "do not fit its config: .* of another shape, first model.embed"),
        (lambda f: (f / "config.json").write_text("{"), "cannot load a model configuration from"),
    ],
)
def test_a_damaged_folder(copy, damage, reason, capfd):
    damage(copy)
    with pytest.raises(ValueError, match=reason) as caught:
        Pretrained(str(copy)).load_causal_lm()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_tokenizer(copy):
    (copy / "tokenizer.json").write_text("not json")
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        Pretrained(str(copy)).load_tokenizer()


@pytest.mark.parametrize("load", [Pretrained.load_causal_lm, Pretrained.load_tokenizer])
def test_a_missing_folder(tmp_path, load):
    with pytest.raises(ValueError, match=r"from '.*none': there is no such folder"):
        load(Pretrained(str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"from .no/such/id.: there is no such folder$"):
        load(Pretrained("no/such/id"))
