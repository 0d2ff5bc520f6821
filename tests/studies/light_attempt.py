"""An attempt that finishes at once; imports little, because SLURM's stand-ins start a process for each."""

import json

from studies.engine.attempt import Attempt


class LightAttempt(Attempt):
    """Runs `main.py` for the control with seed 0, and leaves a made-up result for every other run."""

    def __call__(self, run=None):
        real = self.folder.parent.name == "control" and self.folder.name.startswith("0-")
        return super().__call__(run if real else leave_result)


def leave_result(line, log, environment):
    if line[0] == "fit":
        import torch  # the one process that needs it

        (log.parent / "checkpoints").mkdir()
        content = {"state_dict": {}, "optimizer_states": [], "global_step": 4}
        torch.save(content, log.parent / "checkpoints" / "last.ckpt")
    record = {"status": "finished", "seconds": {"test": 1.0}, "intervals": {}, "n": {}}
    record |= {"metrics": {"test/loss": 3.0, "test/accuracy": 0.5}, "git": {"revision": None, "dirty": None}}
    log.with_name("results.json").write_text(json.dumps(record))
    return 0
