"""The commands of `main.py` and their overview; imports nothing that takes time."""

import sys

COMMANDS = {
    "fit": "Train a model, then test it.",
    "validate": "Measure a checkpoint on the validation set.",
    "test": "Measure a checkpoint on the test sets.",
    "predict": "Run a checkpoint on the prediction set.",
    "generate": "Continue a text, or answer questions, with the model of a checkpoint.",
    "export": "Write the bridge of a telepathy checkpoint as one safetensors file.",
    "study": "Run an experiment: several arms, several seeds, and a verdict on each claim.",
    "ledger": "List the claims of the seed documents with their last verdicts.",
}
RUN_EXAMPLES = {
    "Train, then test": "python main.py fit --config configs/X.yaml [--config overlay.yaml] [--key value]",
    "Continue training": "python main.py fit --config configs/X.yaml --ckpt_path runs/X/.../checkpoints/last.ckpt",
    "Test a checkpoint": "python main.py test --config configs/X.yaml --ckpt_path runs/X/.../checkpoints/last.ckpt",
    "Options of a class": "python main.py fit --model.help Telepathy",
}
OTHER_EXAMPLES = {
    "Continue a text": 'python main.py generate --ckpt_path runs/X/.../checkpoints/last.ckpt --prompt "The "',
    "Run a study": "python main.py study studies/X.yaml [--jobs 2 | --executor slurm --partition gpu]",
    "Report on a study": "python main.py study studies/X.yaml --report-only",
    "Claims and verdicts": "python main.py ledger [--document 004]",
    "Options of a command": "python main.py fit --help",
}


def overview() -> str:
    """Return the program's help: every command with one line, and examples."""
    return "\n".join(
        [
            "Crosstalk: what survives when signals share a medium?",
            "",
            "usage: python main.py COMMAND [options]",
            "",
            _listed(COMMANDS),
            "",
            _listed(RUN_EXAMPLES | OTHER_EXAMPLES),
        ]
    )


def run_help(command: str) -> str:
    """Return the first lines of the help of a command that runs a model."""
    return f"{COMMANDS[command]}\n\n{_listed(RUN_EXAMPLES)}"


def speed_up_help(line: list[str]) -> None:
    """Skip imports if the command line ends in a help page, of a command or of a class (`--model.help Telepathy`)."""
    if any(text in ("-h", "--help") or text.partition("=")[0].endswith(".help") for text in line):
        from cli.help_imports import import_torchmetrics_alone

        import_torchmetrics_alone()


def refuse_unknown(line: list[str]) -> None:
    """Exit with code 2 and the nearest command if a command line does not begin with a command."""
    word, *others = line
    if word in COMMANDS:
        return
    import difflib

    if word.startswith("-"):
        given = next((other for other in others if other in COMMANDS), None)
        message = f"the command comes first, before {word}" + (f": python main.py {given} ..." if given else "")
    else:
        close = difflib.get_close_matches(word, COMMANDS, 1)
        message = f"there is no command '{word}'" + (f"; did you mean '{close[0]}'?" if close else "")
    sys.stderr.write(f"error: {message}\nCommands: {', '.join(COMMANDS)}\n")
    sys.exit(2)


def reader_is_gone() -> bool:
    """Return whether the process that read our output or our errors through a pipe has ended."""
    import select

    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _listed(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())
