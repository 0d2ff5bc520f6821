"""Loading models and tokenizers: whole, in part, with random weights, and the errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, ViTConfig, core_model_loading

from lightning_modules.pretrained.first_layers import layer_stack
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.loading_device import loading_to

PAIR = Path(__file__).parents[2] / "assets" / "pair"


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(PAIR / "source", tmp_path / "copy"))


def tokens(which: str) -> torch.Tensor:
    tokenizer = Pretrained(str(PAIR / which)).load_tokenizer()
    row = tokenizer.encode("Question: Ann has 12 cups.", add_special_tokens=False)
    return torch.tensor([[tokenizer.bos_token_id, *row]])


@pytest.mark.parametrize("layers", [-1, 0, 5])
def test_a_layer_that_does_not_exist(layers):
    with pytest.raises(ValueError, match=f"source_layer {layers} does not exist: .* has layers 1 to 4"):
        Pretrained(str(PAIR / "source")).load_first_layers([layers])


def test_the_layers_of_a_model_are_its_one_outer_list_of_that_length():
    def layers(count: int) -> nn.ModuleList:  # each with as many experts
        return nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Identity()] * 3)}) for _ in range(count))

    text, image = layers(3), layers(3)
    assert layer_stack(nn.ModuleDict({"text": text, "image": nn.ModuleList([nn.Identity()] * 2)}), 3) is text
    assert layer_stack(nn.ModuleDict({"text": text, "image": image}), 3) is None
    assert layer_stack(text[0], 2) is None


def test_a_model_that_is_no_language_model(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(vit\) is no language model"):
        Pretrained(str(tmp_path)).load_first_layers([1])


def test_the_implementation_of_attention_is_chosen_and_said(caplog):
    with caplog.at_level("INFO"):
        Pretrained(str(PAIR / "source"), attn_implementation="eager").load_first_layers([1])
        Pretrained(str(PAIR / "target")).load_causal_lm()
    assert [record.message.split("/")[-1] for record in caplog.records] == [
        "source: llama, 0.459 M parameters, float32, attention eager",
        "target: mistral, 0.492 M parameters, float32, attention sdpa",
    ]
    with pytest.raises(ValueError, match=r"cannot load a model from '.*source': .*fast"):
        Pretrained(str(PAIR / "source"), attn_implementation="fast").load_first_layers([1])


@pytest.mark.parametrize("random_init", [False, True])
def test_attention_of_loaded_models_leaves_out_cudnn(random_init):
    torch.backends.cuda.enable_cudnn_sdp(True)
    Pretrained(str(PAIR / "source"), random_init=random_init).load_first_layers([1])
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@torch.no_grad()
def test_random_init_has_the_shapes_and_nothing_else():
    trained = Pretrained(str(PAIR / "source")).load_causal_lm().state_dict()
    torch.manual_seed(0)
    random = Pretrained(str(PAIR / "source"), random_init=True).load_causal_lm().state_dict()
    assert {name: value.shape for name, value in trained.items()} == {n: value.shape for n, value in random.items()}
    assert not any(torch.equal(trained[name], random[name]) for name in trained)
    part = Pretrained(str(PAIR / "source"), random_init=True).load_first_layers([2]).model
    assert [len(list(layer.parameters())) > 0 for layer in part.layers] == [True, True, False, False]
    assert not torch.equal(part.embed_tokens.weight, trained["model.embed_tokens.weight"])


@torch.no_grad()
def test_random_weights_are_drawn_once_where_they_are_needed(monkeypatch):
    made, make = [], LlamaForCausalLM.__init__

    def watched(model, *args, **options):
        make(model, *args, **options)
        made.append({parameter.device.type for parameter in model.parameters()})

    monkeypatch.setattr(LlamaForCausalLM, "__init__", watched)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(Pretrained(str(PAIR / "source"), random_init=True).load_causal_lm())
    assert made == [{"meta"}] * 3
    model, again, other = (model.state_dict() for model in models)
    assert all(value.device.type == "cpu" for value in [*models[0].parameters(), *models[0].buffers()])
    assert all(torch.equal(value, again[name]) for name, value in model.items())
    assert not torch.equal(model["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    std, config = model["model.layers.0.mlp.up_proj.weight"].std().item(), models[0].config
    assert std == pytest.approx(config.initializer_range, rel=0.05)
    # Buffers that are in no file are computed, and weights that are shared stay shared
    frequencies = Pretrained(str(PAIR / "source")).load_causal_lm().model.rotary_emb.inv_freq
    assert torch.equal(models[0].model.rotary_emb.inv_freq, frequencies)
    shared = models[0].lm_head.weight is models[0].model.embed_tokens.weight
    assert shared == config.tie_word_embeddings
    tokens_BT = tokens("source")
    assert models[0](tokens_BT).logits.isfinite().all()


def test_models_are_loaded_onto_the_device_of_the_run(monkeypatch):
    asked = []

    def load(path, **options):
        asked.append((path, options.get("device_map")))
        raise ValueError("no such device here")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", load)
    gpu = torch.device("cuda", 1)
    for random in (False, True):
        model = Pretrained(str(PAIR / "source"), random_init=random)
        with loading_to(gpu), pytest.raises(ValueError, match="no such device here"):
            model.load_causal_lm()
        with pytest.raises(ValueError, match="no such device here"):
            model.load_causal_lm()
    path = str(PAIR / "source")
    assert asked == [(path, {"": gpu}), (path, None), (None, {"": gpu}), (None, None)]


def test_only_the_layers_that_are_needed_are_read(tmp_path, monkeypatch):
    Pretrained(str(PAIR / "source")).load_causal_lm().save_pretrained(tmp_path, max_shard_size="500KB")
    counts, materialise = [], core_model_loading._materialize_copy

    def watched(tensor, *args, **options):
        value = materialise(tensor, *args, **options)
        counts.append(value.numel())
        return value

    monkeypatch.setattr(core_model_loading, "_materialize_copy", watched)
    part = Pretrained(str(tmp_path)).load_first_layers([1]).model
    assert sum(counts) == sum(parameter.numel() for parameter in part.parameters()) > 0


def test_a_configuration_of_no_causal_model_has_no_random_weights(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot load a model from '.*': vit is no causal language model"):
        Pretrained(str(tmp_path), random_init=True).load_causal_lm()


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
    part = Pretrained(str(tmp_path)).load_first_layers([2])
    assert torch.equal(part(tokens_BT, tokens_BT > 0), states[2])
    assert capfd.readouterr() == ("", "")


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
        (
            lambda f: (f / "config.json").write_text("{"),
            "from '.*copy': config.json is damaged, it is not",
        ),
        (lambda f: (f / "generation_config.json").write_text("[]"), "from '.*copy': generation_config.json is damaged"),
        (lambda f: change_config(f, hidden_size="x"), "Validation error for field 'hidden_size': TypeError: Field"),
    ],
)
def test_a_damaged_folder(copy, damage, reason, capfd):
    damage(copy)
    with pytest.raises(ValueError, match=reason) as caught:
        Pretrained(str(copy)).load_causal_lm()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "reason"), [("not json", "tokenizer.json is damaged"), ("{}", "KeyError 'added_tokens'")]
)
def test_a_damaged_tokenizer(copy, content, reason):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"cannot load a tokenizer from '.*copy': {reason}"):
        Pretrained(str(copy)).load_tokenizer()


@pytest.mark.parametrize("load", [Pretrained.load_causal_lm, Pretrained.load_tokenizer])
def test_a_missing_folder(tmp_path, load):
    with pytest.raises(ValueError, match=r"from '.*none': there is no such folder"):
        load(Pretrained(str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"from .no/such/id.: there is no such folder$"):
        load(Pretrained("no/such/id"))
