"""Layers of a model that are compiled give the same numbers."""

from pathlib import Path

import pytest
import torch

from datamodules.errors import UserError
from lightning_modules.pretrained.causal_lm import logits_at
from lightning_modules.pretrained.generation import generate
from lightning_modules.pretrained.loading import Pretrained

TARGET = str(Path(__file__).parents[2] / "assets/pair/target")


def test_compiled_layers_give_the_logits_gradients_and_answers_of_the_model():
    plain, compiled = Pretrained(TARGET), Pretrained(TARGET, compile=True)
    tokenizer, results, answers = plain.load_tokenizer(), [], []
    torch._dynamo.utils.counters.clear()
    for model in (pretrained.load_causal_lm().eval() for pretrained in (plain, compiled)):
        for B, T in ((2, 9), (3, 17)):
            torch.manual_seed(0)
            vectors_BKD = torch.randn(B, 2, model.get_input_embeddings().weight.shape[1], requires_grad=True)
            column_BT = torch.full((B, T), -1)
            column_BT[:, 3:5] = torch.arange(2)
            logits_NV = logits_at(
                model, torch.arange(B * T).view(B, T), torch.arange(0, B * T, 3), vectors_BKD, column_BT
            )
            results += [logits_NV.detach(), *torch.autograd.grad(logits_NV.logsumexp(-1).sum(), vectors_BKD)]
        answers.append(generate(model, tokenizer, [[1, 2, 3], [4, 5]], 12))
    for expected, found in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert answers[0] == answers[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all layers, shapes and steps


def test_a_model_without_layers_to_compile_is_named(monkeypatch):
    monkeypatch.setattr("lightning_modules.pretrained.loading.layer_stack", lambda *args: None)
    with pytest.raises(UserError, match=r"compile: '.*' \(mistral\) has no single list of layers"):
        Pretrained(TARGET, compile=True).load_causal_lm()
