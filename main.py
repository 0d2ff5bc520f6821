"""Run a command; `python main.py --help` lists them. Modules are imported when the command is known, to start fast."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports ends the process without a stack trace

from cli.commands import overview, reader_is_gone, refuse_unknown, speed_up_help

if TYPE_CHECKING:
    from cli.app import CrosstalkCLI


def main(args: list[str] | None = None) -> CrosstalkCLI | None:
    """Run one command line.

    Args:
        args: The command line without the program's name; `sys.argv[1:]` if None.

    Returns:
        The finished run, with its trainer, model and data; None for the commands that are not one run.
    """
    line = sys.argv[1:] if args is None else args
    if not line or line[0] in ("-h", "--help"):
        print(overview())
        return None
    refuse_unknown(line)
    if line[0] in ("study", "ledger"):
        from studies.engine.command import run

        run(line)
        return None
    if line[0] in ("export", "generate"):
        import_module(f"cli.{line[0]}").run(line[1:])
        return None
    speed_up_help(line)
    from cli.app import CrosstalkCLI

    return CrosstalkCLI(line)


def program() -> None:
    """Run the process's command line; Ctrl-C in a study and the end of a pipe's reader leave no stack trace."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells count
    except BrokenPipeError:
        if not reader_is_gone():
            raise  # another pipe broke, such as one to a worker process
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at exit
        sys.exit(141)  # 128 + SIGPIPE


if __name__ == "__main__":
    program()
