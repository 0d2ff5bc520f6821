"""What an exported file holds, for every kind of bridge and bottleneck: all that answers depend on, nothing else."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from datamodules.errors import UserError
from lightning_modules.telepathy import FlowBridge, KVBridge, PerceiverBridge, TokenBridge
from lightning_modules.telepathy.export import export, read_exported, restore

FLOW = partial(FlowBridge, width=16, heads=2, steps=2)
PERCEIVER = partial(PerceiverBridge, soft_tokens=9, heads=2, width=16)
KINDS = {
    "flow and codebook": (FLOW, {"bottleneck": "vq", "objectives": {"lm": 1.0, "reconstruction": 1.0}}),
    "levels and statistics": (PERCEIVER, {"bottleneck": "fsq", "normalizer": "statistical", "text_prefix": 2}),
    "keys and values": (partial(KVBridge, tokens_per_source=2, hidden=16), {"output": "none"}),
    "flaws": (FLOW, {"reproduce_flaws": ["key_scale", "untrained_output", "primer_mismatch", "missing_bos"]}),
    "head of words": (
        TokenBridge,
        {"objectives": {"lm": 1.0, "bag_of_words": 1.0}, "reproduce_flaws": ["own_head"], "output": "tanh"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_module_answers_from_the_file_as_the_trained_one(telepathy, problems, tmp_path, kind):
    bridge, options = KINDS[kind]
    trained, fresh = (telepathy(bridge, **options).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for name, value in trained.state_dict().items():  # as if training had moved everything
        if value.is_floating_point() and "scale" not in name:
            value.add_(0.1 * torch.rand(value.shape, generator=generator))
    path = Path(tmp_path, "bridge.safetensors")
    export(trained, {"class_path": "Telepathy"}, path)
    restore(fresh, exported := read_exported(str(path), "--ckpt_path"), "--ckpt_path")

    batch = trained.collate(problems[:4], False)
    before_BKD = telepathy(bridge, **options).eval()(batch)
    assert torch.equal(fresh(batch), trained(batch))
    assert not torch.equal(before_BKD, trained(batch))
    # The tokens around soft tokens are those of an answer, which flaws change
    (row, *_) = batch["soft_rows"]
    target = exported.about["target"]
    assert target["head"] + target["tail"] == row.prompt
    assert not [name for name in load_file(path) if name.startswith(("heads.", "text_prefix.", "source.", "target."))]


def test_a_file_without_a_tensor_is_refused(telepathy, tmp_path):
    module, path = telepathy(text_prefix=2), Path(tmp_path, "bridge.safetensors")
    export(module, {}, path)
    exported = read_exported(str(path), "--ckpt_path")
    exported.tensors.pop("soft_tokens.scale")
    with pytest.raises(UserError, match=r'--ckpt_path: the bridge does not fit .*: Missing .*"soft_tokens.scale'):
        restore(module, exported, "--ckpt_path")
