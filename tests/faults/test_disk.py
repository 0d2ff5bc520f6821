"""A full disk ends a run in a sentence, and leaves the checkpoint and the record before it whole."""

import json

import torch
from zygote import ROOT, SIZES


def test_a_full_disk(zygote, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    full = "[{class_path: full_disk.FullDisk, init_args: {at_step: 60}}]"
    sizes = SIZES | {"trainer.callbacks": full, "trainer.default_root_dir": "run"}
    line = ["fit", "--config", "configs/separability_interleaved.yaml"]
    line += [f"--{key}={value}" for key, value in sizes.items()]
    zygote.start(line, tmp_path, tmp_path / "output.txt")
    assert zygote.wait() == [1]
    output = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    assert "run/checkpoints/last.ckpt: File too large; the checkpoints and results that were written" in output
    files = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "last.ckpt" in files
    assert files <= {"last.ckpt", "previous.ckpt"}
    step = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step <= 60
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "failed"
