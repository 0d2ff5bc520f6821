"""The training of the notes between models of the true shapes, to compare with, for `full_size.py`.

Shapes: B batch, S source positions, K soft tokens, A answer tokens, D target width.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.step_rates import WARMUP
from lightning_modules.core.contracts import Workload


def notes_steps(
    source: Any, target: Any, layers: list[int], bridge: Callable[..., Any], data: dict[str, str], rates: Any
) -> None:
    """Train as the notes do: all states of the whole source, padded rows, all logits, weights and AdamW in bf16.

    Args:
        source: The source to load.
        target: The target to load.
        layers: The layers that the bridge reads.
        bridge: Makes the bridge, for a source and a target of some widths.
        data: `path` names the file of problems.
        rates: Counts steps, and has the sizes of batches as `parts`.
    """
    reader, writer = source.load_causal_lm().requires_grad_(False), target.load_causal_lm().requires_grad_(False)
    tokenizer, device = source.load_tokenizer(), writer.device
    tokenizer.pad_token = tokenizer.eos_token
    widths = (
        SimpleNamespace(width=len(layers) * reader.config.hidden_size),
        SimpleNamespace(width=writer.config.hidden_size),
    )
    made = bridge(*widths, True).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-4)
    problems = [json.loads(line) for line in Path(data["path"]).read_text().splitlines()]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (reader, writer, made)]
    embedding = writer.get_input_embeddings()
    for part in list(rates.parts):
        batches = [problems[start : start + part.rows] for start in range(0, len(problems) - part.rows + 1, part.rows)]
        largest = max(batches, key=lambda some: len(some) * max(len(problem["answer"]) for problem in some))
        part.steps = WARMUP + len(batches)
        for some in [largest] * WARMUP + batches:
            padded = {"padding": True, "return_tensors": "pt", "return_token_type_ids": False}
            question = tokenizer([problem["question"] for problem in some], **padded).to(device)
            answer = tokenizer(
                [problem["answer"] + tokenizer.eos_token for problem in some], add_special_tokens=False, **padded
            ).to(device)
            mask_BS, mask_BA = question["attention_mask"].bool(), answer["attention_mask"]
            with torch.autocast(device.type, torch.bfloat16):
                with torch.no_grad():
                    states = reader.base_model(**question, use_cache=False, output_hidden_states=True).hidden_states
                soft_BKD = made(torch.cat([states[layer] for layer in layers], dim=-1), mask_BS)
                soft_BKD = torch.nn.functional.rms_norm(soft_BKD, soft_BKD.shape[-1:]) * embedding.weight.std()
                first_B1D = embedding(mask_BA.new_full((len(some), 1), tokenizer.bos_token_id))
                embeds_BTD = torch.cat([first_B1D, soft_BKD.bfloat16(), embedding(answer["input_ids"])], dim=1)
                before_BK = mask_BA.new_ones(len(some), 1 + soft_BKD.shape[1])
                labels_BA = answer["input_ids"].masked_fill(mask_BA == 0, -100)
                loss = writer(
                    inputs_embeds=embeds_BTD,
                    attention_mask=torch.cat([before_BK, mask_BA], dim=1),
                    labels=torch.cat([torch.full_like(before_BK, -100), labels_BA], dim=1),
                    use_cache=False,
                ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens = embeds_BTD.shape[:2].numel()
            flops = 2 * mask_BS.numel() * sizes[0] + 4 * tokens * sizes[1] + 6 * soft_BKD.shape[:2].numel() * sizes[2]
            rates.count(Workload(len(some), tokens, flops))
            del states, loss
