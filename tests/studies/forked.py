"""Real processes without the seconds of import: forks of the test's interpreter, which has imported everything."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable

import torch

import main as cli
from studies.engine import local


def fork(work: Callable[[], object]) -> int:
    """Start a process that does some work and then ends with its exit code; return the process id."""
    if process := os.fork():
        return process
    code = 1
    try:
        torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect(output: int) -> None:
    """Send this process's output, and that of Python, to a file descriptor."""
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))


class Forked:
    """Stands in for `subprocess.Popen`: a fork that waits for an attempt, as a new interpreter does."""

    def __init__(self, command, stdin, stdout, stderr, env):
        assert (command, stdin) == ([sys.executable, "-c", local.WAIT], subprocess.PIPE)
        receiver, sender = os.pipe()

        def wait_for_attempt():
            os.dup2(receiver, 0)
            os.close(sender)
            sys.stdin = os.fdopen(0)
            redirect(stdout.fileno())
            os.environ.update(env)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            local.wait_for_attempt()

        self.pid = fork(wait_for_attempt)
        os.close(receiver)
        self.stdin, self.returncode = os.fdopen(sender, "wb"), None

    def poll(self):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class ForkedStudy:
    """A study in a process and a process group of its own, whose runs are processes of the group."""

    def __init__(self, line, output):
        def run():
            os.setsid()
            redirect(output.fileno())
            signal.signal(signal.SIGINT, signal.default_int_handler)
            local.Popen = Forked
            sys.argv = ["main.py", *line]
            cli.program()

        self.pid = fork(run)

    def poll(self):
        return Forked.poll(self)

    returncode = None
