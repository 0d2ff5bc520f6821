"""Keys and values that are read from a model and put in again, for many architectures: RoPE has to be exact."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tokenizers_of_kinds import llama_3
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from datamodules.errors import UserError
from datamodules.problems import generate_passkey
from lightning_modules.pretrained.causal_lm import inserted
from lightning_modules.pretrained.key_values import FirstKeyValues, KeyValues, key_values_of
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target

SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 160}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SCALED = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 40}
# What each adds: scaled angles, windows below the row, biases, norms of keys, turns of neighbours or of a part alone
DECODERS: dict[str, dict] = {
    "llama": {"rope_parameters": SCALED},
    "llama yarn": {"rope_parameters": YARN},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6},
    "cohere": {"logit_scale": 0.0625},
    "olmo2": {},
    "stablelm": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gemma4_text": {"head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
LACKS = "does not make its keys and values by one k_proj and one v_proj in each layer"
REFUSED: dict[str, tuple[dict, str]] = {
    "phi3": ({}, LACKS),
    "gpt2": ({}, LACKS),
    "gpt_neox": ({}, LACKS),
    "mamba": ({}, LACKS),
    "opt": (OPT, "has positions in its keys that cannot be taken out"),
}
PROMPT = "Question: {question}\nAnswer:"
PROBLEMS = [generate_passkey(0, "train", index) for index in range(4)]
QUESTIONS, ANSWERS = [p.question[: 40 + 9 * i] for i, p in enumerate(PROBLEMS)], [p.answer for p in PROBLEMS]


def folder(path: Path, name: str, options: dict, kind: type = AutoModelForCausalLM) -> str:
    """Save a model with random weights, large enough for keys to matter."""
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model(name.split()[0], **SIZES | options))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2 if parameter.dim() > 1 else 0.5)
    model.save_pretrained(path)
    llama_3().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_model_that_gets_its_own_keys_and_values_answers_as_from_the_text(tmp_path, name):
    path = folder(tmp_path, name, DECODERS[name])
    source, target = Source(Pretrained(path), [1, 2, 3], PROMPT), Target(Pretrained(path), PROMPT)
    assert source.read_key_values() == target.take_key_values()
    assert source.width == target.width == sum(target.sites.widths)
    batch, rows = source.tokenize(QUESTIONS), target.rows.soft(QUESTIONS, ANSWERS)
    own_BKD, mask_BK = source.read(batch), batch["source_mask"]
    text_rows = target.rows.text(QUESTIONS, ANSWERS)
    own, zero = (target.losses(rows, vectors_BKD, mask_BK) for vectors_BKD in (own_BKD, 0 * own_BKD))
    for own_A, zero_A, text_A in zip(own, zero, target.losses(text_rows), strict=True):
        assert abs(own_A - text_A).max() < min(1e-4, 0.02 * abs(zero_A - text_A).max())
    answers, text_answers = target.answers(rows, 8, own_BKD, mask_BK), target.answers(text_rows, 8)
    assert answers == text_answers
    question_BQ = batch["source"].gather(1, batch["source_place"])
    torch.testing.assert_close(target.vectors(question_BQ)[mask_BK], own_BKD[mask_BK], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_targets_cache_holds_the_keys_turned_to_their_new_positions(tmp_path):
    """A cached key is R_p k: turned back by its own position and on to another one, it is the key of that position."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    path = folder(tmp_path, "llama", {})
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    sites, tokens_BT = key_values_of(model, path), torch.randint(3, 512, (1, 9))
    vectors_BKD = torch.randn(1, 4, sites.width)

    def cached(column: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with inserted(sites, vectors_BKD, torch.tensor([column])):
            cache = model(input_ids=tokens_BT, use_cache=True).past_key_values
        return [(layer.keys[0, 0], layer.values[0, 0]) for layer in cache.layers]

    early, late = cached([-1, 0, 1, 2, 3, -1, -1, -1, -1]), cached([-1, -1, -1, -1, -1, 0, 1, 2, 3])
    wanted = sites.outputs(vectors_BKD)[0].split(sites.widths, dim=-1)
    for layer, ((early_TD, value_TD), (late_TD, _)) in enumerate(zip(early, late, strict=True)):
        torch.testing.assert_close(value_TD[1:5], wanted[2 * layer + 1])
        for key_TD, places in ((early_TD, range(1, 5)), (late_TD, range(5, 9))):
            cos_1KD, sin_1KD = model.model.rotary_emb(key_TD, torch.tensor([[*places]]))
            back_KD = apply_rotary_pos_emb(key_TD[places][None, None], key_TD[places][None, None], cos_1KD, -sin_1KD)[1]
            torch.testing.assert_close(back_KD[0, 0], wanted[2 * layer], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_keys_are_not_to_be_had_is_refused_in_a_sentence(tmp_path, name):
    options, reason = REFUSED[name]
    path = folder(tmp_path, name, options)
    advice = "use a TokenBridge in the place of a KVBridge, or a model such as Llama, Mistral or Qwen"
    message = rf"'{path}' \({name}\) {reason}: {advice}$"
    with pytest.raises(ValueError, match=f"^model.target: {message}"):
        Target(Pretrained(path), PROMPT).take_key_values()
    with pytest.raises(ValueError, match=f"^model.source: {message}"):
        Source(Pretrained(path), [1, 2], PROMPT).read_key_values()


def test_an_encoder_is_refused(tmp_path):
    path = folder(tmp_path, "bert", {}, AutoModel)
    with pytest.raises(ValueError, match=r"^model.source: .* \(bert\) is an encoder: use a TokenBridge in the place"):
        Source(Pretrained(path), [1, 2], PROMPT).read_key_values()


def test_a_target_that_also_passes_a_state_is_refused(tmp_path):
    path = folder(tmp_path, "falcon_h1", HYBRID)
    with pytest.raises(ValueError, match=r"\(falcon_h1\) passes more than keys and values from token to token: use"):
        Target(Pretrained(path), PROMPT).take_key_values()


def test_a_compiled_model_is_refused(tmp_path):
    path = folder(tmp_path, "llama", {})
    with pytest.raises(ValueError, match=r"\(llama\) is compiled, which hides its keys and values \(leave out compile"):
        Target(Pretrained(path, compile=True), PROMPT).take_key_values()


@torch.no_grad()
def test_vectors_are_standardised_and_statistics_stay_out_of_state_dicts(tmp_path):
    path = folder(tmp_path, "qwen2", {})
    read = FirstKeyValues(Pretrained(path).load_first_layers([1, 3]), path)
    assert read.sites.layer_widths == [32, 32]
    tokens_BT = torch.randint(3, 512, (40, 60), generator=torch.Generator().manual_seed(1))
    vectors_ND = read(tokens_BT, tokens_BT > 0)[:, 1:].flatten(0, 1)
    assert not any(site._forward_hooks for site in read.sites.sites)
    outputs_ND = read.sites.outputs(vectors_ND)
    for x_ND, fits in ((vectors_ND, True), (outputs_ND, False)):
        assert (x_ND.mean(0).abs().mean() < 0.3) == fits
        assert ((x_ND.std(0) - 1).abs().mean() < 0.3) == fits
    assert not [name for name in read.state_dict() if "mean_D" in name or "std_D" in name]
    torch.testing.assert_close(read.sites.vectors(outputs_ND), vectors_ND, atol=1e-4, rtol=1e-4)


def test_a_first_position_far_from_the_others_does_not_count():
    layer = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("k_proj", "v_proj")})

    def run(tokens_BT: torch.Tensor) -> torch.Tensor:
        states_BTC = torch.randn(*tokens_BT.shape, 4)
        states_BTC[:, 0] *= 1e4
        return layer["k_proj"](states_BTC) + layer["v_proj"](states_BTC)

    assert KeyValues([layer], run, 512).std_D.max() < 10
    with pytest.raises(UserError, match=LACKS):  # its projections are not called
        KeyValues([layer], lambda tokens_BT: tokens_BT, 512)
    with pytest.raises(UserError, match=LACKS):  # it has two of each
        KeyValues([torch.nn.ModuleDict({"own": layer, "cross": deepcopy(layer)})], run, 512)
