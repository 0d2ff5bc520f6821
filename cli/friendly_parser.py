"""The parser of configs and of the commands that run a model: each mistake is one sentence and a hint."""

import os
import stat
import sys
from argparse import RawDescriptionHelpFormatter
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from cli.config_errors import explain
from cli.flags import check_line
from datamodules.errors import UserError


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the description."""


class FriendlyParser(ArgumentParser):
    """A parser whose errors are one sentence and a hint: no usage, no stack trace, exit code 2.

    Attributes:
        file: The config file that is being parsed, or an empty string.
    """

    file: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # No abbreviations: `--trainer.max_step` is unambiguous only until Lightning has a second option of that start.
        settings: dict[str, Any] = {"formatter_class": HelpFormatter, "allow_abbrev": False} | kwargs
        super().__init__(*args, **settings)

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """Check and parse a command line."""
        check_line(sys.argv[1:] if args is None else args)
        return super().parse_args(args, *others, **options)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config file.

        Raises:
            UserError: The file cannot be read.
        """
        self.file = os.path.relpath(path)  # now, for jsonargparse changes the working directory while it parses
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe without a writer would make the program wait for ever
                raise UserError(f"the config file {self.file} cannot be read: it is not a regular file")
            config: Namespace = super().parse_path(path, *args, **kwargs)
        except UnicodeError as error:
            raise UserError(f"the config file {self.file} is not a text in UTF-8 ({error})") from error
        except OSError as error:
            raise UserError(f"the config file {self.file} cannot be read: {error.strerror or error}") from error
        self.file = ""
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Explain the error on stderr and exit with code 2."""
        if not self.exit_on_error:  # an inner parser: the outer one tries the next member of a union
            super().error(message, ex)
        sentence, hint = explain(getattr(ex, "subcommand_parser", None) or self, message, ex)
        sys.stderr.write(f"error: {sentence}\n{hint}\n")
        self.exit(2)
