"""Crosstalk: what survives when signals share a medium?

Train, then test:     python main.py fit --config configs/X.yaml [--config overlay.yaml] [--key value]
Test a checkpoint:    python main.py test --config configs/X.yaml --ckpt_path runs/X/.../checkpoints/last.ckpt
Go on training:       python main.py fit --config configs/X.yaml --ckpt_path runs/X/.../checkpoints/last.ckpt
Many runs, a verdict: python main.py study studies/X.yaml [--jobs 2 | --executor slurm --partition gpu]
Claims and verdicts:  python main.py ledger
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cli.app import CrosstalkCLI


def main(args: list[str] | None = None) -> CrosstalkCLI | None:
    """Run one command line, `sys.argv` if no arguments are given."""
    line = sys.argv[1:] if args is None else args
    if line[:1] in (["study"], ["ledger"]):
        from studies.engine.command import run

        run(line)
        return None
    from cli.app import CrosstalkCLI

    return CrosstalkCLI(args)


if __name__ == "__main__":
    main()
