"""A SLURM of one node in a folder: munge, the controller and the node's daemon, without systemd, cgroups or accounting.

As root, where Debian's packages `slurm-wlm` and `munge` are installed:

    apt-get install --no-install-recommends slurm-wlm munge
    python -m pytest -m slurm tests/slurm

By hand, until Ctrl-C or SIGTERM: `python tests/slurm/one_node.py`, and in another shell the `export` that it prints.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
DEADLINE = 60.0  # seconds for the daemons to answer
CONF = """
ClusterName=onenode
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
ReturnToService=2
KillWait=10
InactiveLimit=0
MinJobAge=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return why SLURM cannot be started here; an empty string if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian's packages slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


class OneNode:
    """Starts SLURM when its context is entered, and ends every daemon and job when it is left.

    Attributes:
        folder: Configuration, state and logs.
        environment: The variables with which SLURM's commands find this cluster.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "OneNode":
        with ExitStack() as undo:
            undo.callback(self.close)
            self.folder.chmod(0o755)
            for name in ("state", "spool"):
                (self.folder / name).mkdir()
            key = self.folder / "munge.key"
            key.write_bytes(os.urandom(128))
            key.chmod(0o400)
            ports = {"controller": _free_port(), "node": _free_port()}
            host = socket.gethostname().partition(".")[0]
            text = CONF.format(folder=self.folder, host=host, cpus=os.cpu_count(), **ports)
            (self.folder / "slurm.conf").write_text(text)
            options = [f"--{what}-file={self.folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
            self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *options)
            self.start_controller()
            self._start("slurmd", "-D")
            self._wait_for("idle", "sinfo", "--noheader", "--format=%t")
            undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers."""
        self._start("slurmctld", "-D")
        self._wait_for("UP", "scontrol", "ping")

    def kill_controller(self) -> None:
        """End slurmctld without notice."""
        self._daemons.pop("slurmctld").kill()

    def call(self, *line: str) -> str:
        """Run one of SLURM's commands and return its output; an empty string if it fails."""
        done = subprocess.run(line, env=os.environ | self.environment, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def cancel_jobs(self) -> None:
        """End every job at once and wait until none is left."""
        self.call("scancel", "--signal=KILL", "--full", "--user=root")
        self.call("scancel", "--user=root")
        self._wait_for("", "squeue", "--noheader")

    def close(self) -> None:
        """Cancel the jobs, end the daemons, and remove the folder."""
        if "slurmctld" in self._daemons:
            self.cancel_jobs()
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(15)
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *options: str) -> None:
        program = shutil.which(name, path=_path())
        assert program is not None  # see `missing`
        with open(self.folder / f"{name}.out", "a") as output:
            self._daemons[name] = subprocess.Popen(
                [program, *options], env=os.environ | self.environment, stdout=output, stderr=output
            )

    def _wait_for(self, word: str, *line: str) -> None:
        """Wait until a command's output has the word, or is empty if the word is."""
        deadline = time.monotonic() + DEADLINE
        while not (word in (shown := self.call(*line)) if word else not self.call(*line)):
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("slurm*.log"))
                raise TimeoutError(f"{' '.join(line)}: {shown if word else ''}\n{logs}")
            time.sleep(0.2)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has it ignore Ctrl-C
        signal.signal(number, lambda *_: sys.exit())
    with OneNode() as node:
        print(f"export SLURM_CONF={node.folder}/slurm.conf", flush=True)
        signal.pause()
