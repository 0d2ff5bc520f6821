"""A parser for the commands that are not one run; it starts at once."""

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn


class PlainParser(ArgumentParser):
    """An argparse parser whose errors are one sentence and a hint; imports nothing, unlike `FriendlyParser`."""

    def __init__(self, command: str, description: str):
        super().__init__(
            prog=f"main.py {command}",
            description=description,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._line: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse, and remember the command line for `error`."""
        self._line = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(self._line, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error on stderr and exit with code 2."""
        from cli.choices import near

        found = re.match(r"unrecognized arguments: ([^\s=]+)", message)
        unknown = found[1] if found else None
        if "required" in message:  # an option may only seem to be missing, because its name is wrong
            names = [text.partition("=")[0] for text in self._line if text.startswith("--") and len(text) > 2]
            unknown = next((name for name in names if name not in self._option_string_actions), None)
        if unknown:
            kind = "option" if unknown.startswith("-") else "use for the argument"
            message = f"there is no {kind} {unknown}{near(unknown, self._option_string_actions)}"
        sys.stderr.write(f"error: {message}\nList options: python {self.prog} --help\n")
        self.exit(2)


@contextmanager
def mistakes_in_words() -> Iterator[None]:
    """Answer a user's mistake in the block by a sentence, with exit code 2, and a full disk or memory with code 1."""
    try:
        yield
    except Exception as error:
        from cli.user_errors import host_message, user_message

        mistake = user_message(error)
        if not (sentence := mistake or host_message(error)):
            raise
        sys.stderr.write(f"error: {sentence}\n")
        sys.exit(2 if mistake else 1)
