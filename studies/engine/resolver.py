"""The resolved configs of a study's arms."""

import gc
import sys
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a hundred arms: the loader in C saves a second
PARSERS: "dict[str, LightningArgumentParser]" = {}  # command -> its parser; building one takes longer than using it


def import_program() -> None:
    """Import every line of research.

    The garbage collector rests meanwhile: it would search a million objects of modules, of which none is garbage, and
    take a second or more.
    """
    if "cli.app" in sys.modules:
        return
    gc.disable()
    try:
        import cli.app  # noqa: F401
    finally:
        gc.enable()


def resolve(command: str, *options: str) -> dict[str, Any]:
    """Return the resolved config of a run's command line, and exit on a user's mistake as the run itself does.

    Args:
        command: `fit`, `validate` or `test`.
        options: The rest of the command line.
    """
    import_program()
    from cli import renames
    from cli.resolver import Resolver

    if command not in PARSERS:
        resolver = Resolver([command, *options])
        PARSERS[command] = resolver._parser(command)
        return resolver.resolved
    parser = PARSERS[command]
    config = parser.parse_args(renames.renamed_line(list(options)))
    # skip_unset: a null that the user set may replace a default; no validation, because parsing was one
    text = parser.dump(config, skip_unset=False, skip_validation=True)
    resolved: dict[str, Any] = yaml.load(text, LOADER)
    return resolved
