"""A run that is killed within an epoch goes on bit for bit: with workers, with averaged weights, on two ranks."""

import pytest
import torch
from zygote import ROOT, SIZES

STEPS = 30
QUICK = SIZES | {"trainer.max_steps": STEPS, "trainer.val_check_interval": 7, "model.warmup_steps": 3}
RANKS = {"trainer.devices": 2, "trainer.strategy": "ddp"}
LONG = pytest.mark.faults
CASES = [
    pytest.param({"data.num_workers": 2}, 1, id="two workers"),
    pytest.param(RANKS | {"data.num_workers": 2, "average": True}, 2, id="two ranks, workers, EMA"),
    pytest.param({}, 1, id="plain", marks=LONG),
    pytest.param({"average": True}, 1, id="EMA", marks=LONG),
    pytest.param(RANKS, 2, id="two ranks", marks=LONG),
]


@pytest.mark.parametrize(("settings", "ranks"), CASES)
def test_a_killed_run_goes_on_bit_for_bit(zygote, tmp_path, settings, ranks):
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def fit(name, kill=None, checkpoint=None):
        callbacks = ["EMAWeightAveraging"] if settings.get("average") else []
        callbacks += [f"{{class_path: victims.KillAt, init_args: {{step: {kill}}}}}"] if kill else []
        keys = QUICK | settings | {"trainer.callbacks": f"[{', '.join(callbacks)}]", "trainer.default_root_dir": name}
        keys |= {"ckpt_path": checkpoint} if checkpoint else {}
        line = [f"--{key}={value}" for key, value in keys.items() if key != "average"]
        output = tmp_path / f"{name}.txt"
        zygote.start(["fit", "--config", "configs/separability_interleaved.yaml", *line], tmp_path, output, ranks)
        codes = zygote.wait()
        assert codes == [-9 if kill else 0] * ranks, output.read_text()
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)

    whole, cut = fit("whole"), fit("cut", kill=19)
    assert 7 <= cut["global_step"] < STEPS
    found = fit("on", checkpoint=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert found["global_step"] == STEPS
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, found["state_dict"][name]), name
    for state, expected in zip(found["optimizer_states"], whole["optimizer_states"], strict=True):
        for number, moments in expected["state"].items():
            assert all(torch.equal(x, state["state"][number][name]) for name, x in moments.items())
