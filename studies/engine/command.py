"""The commands `study` and `ledger`.

Both parse with argparse and import the rest when they need it: `ledger` and `study --help` answer at once.
"""

import fcntl
import math
import signal
import sys
from argparse import ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

from cli.plain_parser import PlainParser
from lightning_modules.core.signals import Interrupted, Signals

if TYPE_CHECKING:
    from studies.engine.execution import Cluster
    from studies.engine.study import Study

STUDY_HELP = """Run a study: every arm with every seed, then a report with a verdict on each claim.

Finished runs are not repeated: call an interrupted study again to continue it. The report goes to runs/studies/<name>/.
"""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ADVICE = "call it again to continue"
ON_SLURM = ("partition", "account", "qos", "constraint", "gpus", "cpus", "memory", "hours", "setup")  # options
LEAST = {"jobs": 0, "gpus": 0, "cpus": 1, "hours": 1 / 60}


def run(line: list[str]) -> None:
    """Run a command line; a user's mistake is answered by a sentence, with exit code 2.

    Args:
        line: `study FILE ...` or `ledger ...`.
    """
    try:
        with Signals(SIGNALS, ADVICE) as signals:
            code = _study(line[1:], signals) if line[0] == "study" else _ledger(line[1:])
    except Interrupted as ended:
        sys.stderr.write(f"interrupted: {ADVICE}\n")
        sys.exit(ended.exit_code)
    except Exception as error:
        from datamodules.errors import UserError  # the package imports torch, without which the ledger starts at once

        if not isinstance(error, UserError):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    if code:
        sys.exit(code)


def _study(line: list[str], signals: Signals) -> int:
    options = _study_parser().parse_args(line)
    cluster = make_cluster(options)

    from studies.engine.execution import execute, prepare
    from studies.engine.local import LocalExecutor
    from studies.engine.study import resolve_arms
    from studies.engine.study_file import read

    file = read(options.file)
    with LocalExecutor() as executor:
        signals.before_end = executor.kill
        if not options.report_only:
            prepare(executor, cluster, file)
        study = resolve_arms(file, options.file)
        _make_folder(study)
        failed = [] if options.report_only else execute(study, cluster, executor)

    from studies.engine import report  # after the runs have begun: scipy and matplotlib take seconds to import

    try:
        with open(study.folder / "report.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two calls of one study end with the same run, and at the same time
            text = report.write(study)
    except OSError as error:  # a full disk, or a folder without permission to write
        from datamodules.errors import UserError

        raise UserError(f"the report in {study.folder} cannot be written: {error.strerror or error}") from error
    print(text)
    if failed:
        print(f"\n{len(failed)} of {len(study.runs)} runs failed: {', '.join(run.name for run in failed)}")
    return 1 if failed else 0


def _study_parser() -> PlainParser:
    parser = PlainParser("study", STUDY_HELP)
    add = parser.add_argument
    add("file", metavar="FILE", help="the study's YAML file")
    add("--report-only", action="store_true", help="write the report of the finished runs, and run nothing")
    add("--executor", choices=("local", "slurm"), default="local", help="run on this machine (default) or on SLURM")
    add("--jobs", type=int, default=0, metavar="N", help="simultaneous runs; 0 (default): one here, all on SLURM")
    slurm = parser.add_argument_group("on SLURM, where each wave of runs is a job array")
    for name in ("partition", "account", "qos"):
        slurm.add_argument(f"--{name}", metavar="NAME", help=f"SLURM {name}")
    slurm.add_argument("--constraint", metavar="NAME", help="constraint on nodes")
    slurm.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs per run (default 1)")
    slurm.add_argument("--cpus", type=int, default=8, metavar="N", help="CPU cores per run (default 8)")
    slurm.add_argument("--memory", metavar="SIZE", help="memory per run, such as 64GB")
    hours = "time limit of a run (default 4); a run that reaches it is queued again and continues from its checkpoint"
    slurm.add_argument("--hours", type=float, default=4.0, metavar="X", help=hours)
    setup = "shell lines before each run, such as '[module load cuda, source env/bin/activate]'"
    slurm.add_argument("--setup", type=_shell_lines, metavar="LIST", help=setup)
    return parser


def _shell_lines(text: str) -> list[str]:
    import yaml

    try:
        lines = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentTypeError(f"{text} is not a YAML list") from error
    if isinstance(lines, str):
        return [lines]
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ArgumentTypeError(f"{text} is not a list of shell lines")
    return lines


def make_cluster(options: Namespace) -> "Cluster":
    """Return where and how to run.

    Raises:
        UserError: A number is too small, or not finite; or an option has no effect.
    """
    from datamodules.errors import UserError

    for name, least in LEAST.items():
        if not least <= (value := getattr(options, name)) < math.inf:
            raise UserError(f"--{name} {value}: it must be at least {least:.3g}")

    from studies.engine.execution import Cluster

    if options.executor == "local":
        defaults = vars(_study_parser().parse_args([options.file]))
        if without := [name for name in ON_SLURM if getattr(options, name) != defaults[name]]:
            raise UserError(f"--{without[0]} has no effect here: add --executor slurm")
        return Cluster("local", options.jobs or 1)
    named = {name: getattr(options, name) for name in ("partition", "account", "qos", "constraint", "setup")}
    named |= {"mem": options.memory, "cpus_per_task": options.cpus, "time": round(60 * options.hours)}
    named |= {"ntasks_per_node": 1, "gpus_per_node": options.gpus or None}
    slurm = {f"slurm_{name}": value for name, value in named.items() if value is not None}
    return Cluster("slurm", options.jobs, slurm)


def _make_folder(study: "Study") -> None:
    from datamodules.errors import UserError

    try:
        study.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the study's folder {study.folder} cannot be made: {error}") from error


def _ledger(line: list[str]) -> int:
    parser = PlainParser("ledger", "Print every claim of the seed documents with its last verdict.")
    parser.add_argument("--document", default="", metavar="ID", help="only the claims of this document, such as 004")
    options = parser.parse_args(line)

    from studies.engine import ledger

    print(ledger.table(options.document))
    return 0
