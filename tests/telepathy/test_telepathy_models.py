"""Models of many architectures, against their own library's forward and generate, row by row."""

from pathlib import Path

import pytest
import tokenizers_of_kinds as kinds
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertForMaskedLM

from datamodules.problems import generate_passkey
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.positions import positions
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target

SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 160}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PER_LAYER = {"head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512}
# What each adds: scales or caps of logits, scales of embeddings, windows below the row, positions that are learned
DECODERS: dict[str, dict] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6},
    "gemma4_text": PER_LAYER,
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
    "cohere": {"logit_scale": 0.0625},
    "olmo2": {},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "stablelm": {},
    "nanochat": {},
    "mamba": {},
}
ENCODERS: dict[str, dict] = {"bert": {}, "roberta": {"pad_token_id": 1}, "albert": {"embedding_size": 16}}
ENCODERS |= {"fnet": {}}  # it has no mask, so padding changes its states
BART = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
PAIRS: dict[str, dict] = {"t5": {"d_kv": 8, "d_ff": 32}, "bart": BART | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}}
PROBLEMS = [generate_passkey(0, "train", index) for index in range(4)]
QUESTIONS, ANSWERS = [p.question[: 40 + 9 * i] for i, p in enumerate(PROBLEMS)], [p.answer for p in PROBLEMS]


def folder(path: Path, name: str, kind: type) -> str:
    """Save a model with random weights, and a tokenizer: without BOS for Qwen's, BERT's for encoders."""
    torch.manual_seed(0)
    options = SIZES | (DECODERS | ENCODERS)[name]
    model = kind.from_config(AutoConfig.for_model(name.split()[0], **options))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else None
    if kind is AutoModelForCausalLM:  # settings that a greedy answer must not follow
        model.generation_config.update(num_beams=2, repetition_penalty=3.0, no_repeat_ngram_size=1, eos_token_id=[2, 9])
    model.save_pretrained(path)
    make = kinds.qwen if "qwen" in name else kinds.wordpiece if name in ENCODERS else kinds.llama_3
    make().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", DECODERS)
def test_losses_answers_and_states_are_the_models_own(tmp_path, name):
    path = folder(tmp_path, name, AutoModelForCausalLM)
    target, own = Target(Pretrained(path), "Question: {question}\nAnswer:"), AutoModelForCausalLM.from_pretrained(path)
    soft_rows, rows = target.rows.soft(QUESTIONS, ANSWERS), target.rows.text(QUESTIONS, ANSWERS)
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    losses, answers = target.losses(rows), target.answers(rows, 8)
    assert own.generation_config.to_dict() == target.model.generation_config.to_dict()
    for row, losses_A, answer in zip(rows, losses, answers, strict=True):
        tokens_BT = torch.tensor([row.prompt + row.answer])
        logits_AV = own(tokens_BT).logits[0, len(row.prompt) - 1 : -1].float()
        wanted_A = torch.nn.functional.cross_entropy(logits_AV, torch.tensor(row.answer), reduction="none")
        torch.testing.assert_close(torch.tensor(losses_A), wanted_A.detach(), atol=1e-4, rtol=0)
        prompt_BT = tokens_BT[:, : len(row.prompt)]
        new = own.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=8, **greedy)
        ends = {2, 9, target.tokenizer.eos_token_id}
        made = new[0, len(row.prompt) :].tolist()
        length = next((i for i, token in enumerate(made) if token in ends), len(made))
        assert answer.text == target.tokenizer.decode(made[:length], skip_special_tokens=True).strip()
        assert answer.is_cut == (length == 8)

    scale = own.get_input_embeddings()(torch.arange(512)).square().mean().sqrt().item()
    assert target.scale() == pytest.approx(scale, rel=1e-4)
    vectors_BKD = (scale * torch.randn(4, 5, target.width)).requires_grad_()
    mask_BK = torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None]
    target.logits(target.pack(soft_rows, mask_BK), vectors_BKD).square().mean().backward()
    assert torch.equal((vectors_BKD.grad != 0).any(-1), mask_BK)
    together = target.losses(soft_rows, vectors_BKD, mask_BK)
    for i, losses_A in enumerate(together):
        (alone_A,) = target.losses(soft_rows[i : i + 1], vectors_BKD[i : i + 1], mask_BK[i : i + 1])
        assert losses_A == pytest.approx(alone_A, abs=1e-4)


def test_a_target_in_bf16_takes_vectors_in_fp32_and_its_head_reads_the_answer_alone(tmp_path):
    path, seen = folder(tmp_path, "llama", AutoModelForCausalLM), []
    whole, target = (Target(Pretrained(path, dtype=dtype), "{question}") for dtype in ("float32", "bfloat16"))
    target.model.lm_head.register_forward_hook(lambda head, args, output: seen.append(output.shape[:-1].numel()))
    vectors_BKD, mask_BK = torch.randn(4, 5, target.width), torch.ones(4, 5, dtype=torch.bool)
    rows = target.rows.soft(QUESTIONS, ANSWERS)
    for half_A, losses_A in zip(*(t.losses(rows, vectors_BKD, mask_BK) for t in (target, whole)), strict=True):
        assert half_A == pytest.approx(losses_A, rel=0.1)
    assert seen == [sum(len(row.answer) for row in rows)]
    assert len(target.answers(rows, 3, vectors_BKD, mask_BK)) == 4


@pytest.mark.parametrize("name", [name for name in DECODERS | ENCODERS if name not in ("llama tied", "mamba")])
@torch.no_grad()
def test_states_are_the_models_own(tmp_path, name):
    path = folder(tmp_path, name, AutoModel)
    own = AutoModel.from_pretrained(path)
    for layers in ([1], [2, 1], [3, 1]):
        source = Source(Pretrained(path), layers, "Q:{question}")
        assert source.model.is_bidirectional == (name in ENCODERS)
        assert source.model.reads_padding == (name == "fnet")
        batch = source.tokenize(QUESTIONS)
        for states_SC, place_S, mask_S, tokens_T, real_T in zip(
            source.read(batch),
            *(batch[key] for key in ("source_place", "source_mask", "source", "source_real")),
            strict=True,
        ):
            states = own(tokens_T[real_T][None], output_hidden_states=True).hidden_states
            wanted_TC = torch.cat([states[layer][0] for layer in layers], dim=-1)
            torch.testing.assert_close(states_SC[mask_S], wanted_TC[place_S[mask_S]], atol=1e-4, rtol=1e-4)
    part, whole = (Pretrained(path).load_first_layers([k]).model.num_parameters() for k in (1, 3))
    assert (part < 0.9 * whole) == (name != "albert")  # whose layers share their weights


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_layers_are_read_from_the_encoder_of_a_pair_of_encoder_and_decoder(tmp_path, name):
    own = AutoModel.from_config(AutoConfig.for_model(name, **SIZES | PAIRS[name])).eval()
    own.save_pretrained(tmp_path)
    tokens_BT = torch.randint(3, 512, (1, 9))
    states = own.get_encoder()(tokens_BT, output_hidden_states=True).hidden_states
    read = Pretrained(str(tmp_path)).load_first_layers([2])
    assert read.is_bidirectional
    torch.testing.assert_close(read(tokens_BT, tokens_BT > 0), states[2], atol=1e-4, rtol=1e-4)
    assert name != "t5" or not any("decoder" in name for name, _ in read.named_parameters())


def test_a_masked_language_model_needs_no_pooler(tmp_path):
    own = BertForMaskedLM(AutoConfig.for_model("bert", **SIZES))
    own.save_pretrained(tmp_path)
    tokens_BT = torch.randint(3, 512, (1, 9))
    states = own.eval().bert(tokens_BT, output_hidden_states=True).hidden_states
    read = Pretrained(str(tmp_path)).load_first_layers([2])
    torch.testing.assert_close(read(tokens_BT, tokens_BT > 0), states[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "limit"),
    [
        ("bert", {}, 160),
        ("roberta", {"pad_token_id": 1}, 158),  # its first position is 2
        ("llama", {"vocab_size": 160}, 160),  # as many tokens as positions
        ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48}, None),  # writes -1
    ],
)
def test_the_positions_that_a_model_reads(name, options, limit):
    sizes = {"vocab_size": 512} if limit is None else SIZES
    model = AutoModel.from_config(AutoConfig.for_model(name, **sizes | options)).eval()
    assert positions(model) == limit
    model(input_ids=torch.full((1, limit or 200), 5))
    if name in ENCODERS:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))
