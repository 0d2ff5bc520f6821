"""Starts runs of `main.py` from an interpreter that has imported the program: an import takes longer than a run."""

import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 200
SIZES = {
    "data.vocab_size": 32,
    "data.seq_len": 16,
    "data.batch_size": 4,
    "data.validation_size": 32,
    "data.eval_batch_size": 8,
    "data.test_size": 64,
    "model.vocab_size": 32,
    "model.seq_len": 16,
    "model.width": 16,
    "model.warmup_steps": 10,
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": 45,
    "trainer.log_every_n_steps": 10,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.callbacks": "[{class_path: victims.SlowSteps}]",
    "checkpoint_minutes": 0.003,  # several in each run
}


class Zygote:
    """An interpreter that forks the processes of a run, one run at a time."""

    def __init__(self) -> None:
        places = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from zygote import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, line: Sequence[str], folder: Path, output: Path, ranks: int = 1, **variables: str) -> list[int]:
        """Start a run in a working directory, as so many ranks; return the process numbers."""
        settings = [variables | place for place in places(ranks)]
        request = {"line": list(line), "folder": str(folder), "output": str(output), "variables": settings}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self) -> list[int]:
        """Wait for the run; return the exit codes of its ranks, negative for a signal that was not handled."""
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the interpreter."""
        self.process.stdin.close()
        self.process.wait(10)


def places(ranks: int) -> list[dict[str, str]]:
    """Return the environment that `torchrun` gives each rank; nothing for a single process."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"GROUP_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def serve() -> None:
    """Answer each line of stdin with the process numbers, and then with their exit codes."""
    from studies.engine.resolver import import_program

    import_program()
    print("ready", flush=True)
    while message := sys.stdin.readline():
        request, ranks = json.loads(message), []
        for variables in request["variables"]:
            if not (child := os.fork()):
                _run(request, variables)
            ranks.append(child)
        print(json.dumps(ranks), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]), flush=True)


def _run(request: dict, variables: dict[str, str]) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    code = 1
    try:
        os.setsid()  # so that the processes which a study starts can be found
        os.chdir(request["folder"])
        os.environ.update(variables)
        rank_zero_only.rank = int(variables.get("RANK", 0))  # Lightning has read it at its import
        output = os.open(request["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(source, stream)
        sys.argv = [str(ROOT / "main.py"), *request["line"]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
