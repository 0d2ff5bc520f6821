"""The commands `study` and `ledger`."""

import sys
from typing import Literal

from jsonargparse import ActionYesNo

from cli.config_errors import FriendlyParser
from cli.user_errors import user_message
from datamodules.errors import UserError
from studies.engine import ledger, report
from studies.engine.arms import Resolve
from studies.engine.claims import ClaimError
from studies.engine.execution import Cluster, execute
from studies.engine.study import load

STUDY_HELP = """Run a study: every arm with every seed, then a report with a verdict on each claim.

What is finished is not run again: interrupt it and call it again. The report goes to runs/studies/<name>/.
"""


def run(line: list[str], resolve: Resolve) -> None:
    """Run a command line; mistakes are told in a sentence, with exit code 2.

    Args:
        line: `study FILE ...` or `ledger ...`.
        resolve: Gives the resolved config of a command line of a run.
    """
    try:
        code = _study(line[1:], resolve) if line[0] == "study" else _ledger(line[1:])
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: call it again to go on\n")
        sys.exit(130)
    except Exception as error:
        message = str(error) if isinstance(error, ClaimError) else user_message(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(2)
    if code:
        sys.exit(code)


def make_cluster(
    executor: Literal["local", "slurm"] = "local",
    jobs: int = 0,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    gpus: int = 1,
    cpus: int = 8,
    memory: str | None = None,
    hours: float = 4.0,
    setup: list[str] | None = None,
) -> Cluster:
    """Where to run.

    Args:
        executor: `local` runs on this machine, `slurm` queues a job array for each wave of runs.
        jobs: How many runs at a time. 0: one here, all on SLURM.
        partition: SLURM partition.
        account: SLURM account.
        qos: SLURM quality of service.
        constraint: SLURM constraint on nodes.
        gpus: GPUs a run, on SLURM.
        cpus: CPU cores a run, on SLURM.
        memory: Memory a run, such as 64GB, on SLURM.
        hours: Time limit of a run, on SLURM; a run that meets it is queued again and goes on from its last checkpoint.
        setup: Shell lines before a run on SLURM, such as '[module load cuda, source env/bin/activate]'.
    """
    least = {"jobs": (jobs, 0), "gpus": (gpus, 0), "cpus": (cpus, 1), "hours": (hours, 1 / 60)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise UserError(f"--{name} {value}: it must be at least {bound:.3g}")
    if executor == "local":
        return Cluster("local", jobs or 1)
    named = {"partition": partition, "account": account, "qos": qos, "constraint": constraint, "mem": memory}
    options = {f"slurm_{name}": value for name, value in named.items() if value is not None}
    options |= {"slurm_cpus_per_task": cpus, "slurm_time": round(60 * hours), "slurm_ntasks_per_node": 1}
    options |= {"slurm_gpus_per_node": gpus} if gpus else {}
    return Cluster("slurm", jobs, options | ({"slurm_setup": setup} if setup else {}))


def _study(line: list[str], resolve: Resolve) -> int:
    parser = FriendlyParser(prog="main.py study", description=STUDY_HELP)
    parser.add_argument("file", metavar="FILE", help="The study's YAML file.")
    parser.add_function_arguments(make_cluster)
    parser.add_argument("--report-only", action=ActionYesNo, default=False, help="Report what is there, run nothing.")
    options = vars(parser.parse_args(line))
    file, report_only = options.pop("file"), options.pop("report_only", False)
    cluster = make_cluster(**options)
    study = load(file, resolve)
    failed = [] if report_only else execute(study, cluster)
    print(report.write(study))
    if failed:
        print(f"\n{len(failed)} of {len(study.runs)} runs failed: {', '.join(run.name for run in failed)}")
    return 1 if failed else 0


def _ledger(line: list[str]) -> int:
    parser = FriendlyParser(prog="main.py ledger", description="Print every claim with its last verdict.")
    parser.add_argument("--document", type=str, default="", help="Only the rows of this document, such as 004.")
    options = parser.parse_args(line)
    print(ledger.table(options.document))
    return 0
