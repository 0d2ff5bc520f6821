"""The command `export`: a trained bridge as one file for other programs."""

from argparse import Namespace
from pathlib import Path

from cli.plain_parser import PlainParser, mistakes_in_words

HELP = """Write the bridge of a Telepathy checkpoint as one safetensors file, with what identifies its models.

docs/telepathy_full_size.md has a program that answers questions with such a file, without this project.

  python main.py export --ckpt_path runs/telepathy_v16/<run>/checkpoints/last.ckpt --output bridge.safetensors
"""


def run(line: list[str]) -> None:
    """Run a command line; a user's mistake is answered by a sentence, with exit code 2.

    Args:
        line: The command line behind `export`.
    """
    options = _parser().parse_args(line)
    with mistakes_in_words():
        print(f"bridge: {exported(options)}")


def exported(options: Namespace) -> Path:
    """Write the file and return its path.

    Raises:
        UserError: The checkpoint cannot be used, or is of another model.
    """
    from cli.loaded import checkpoint, trained
    from cli.run_folder import check_folder
    from datamodules.errors import UserError
    from datamodules.sources import check_path
    from lightning_modules.core.archive import find_file
    from lightning_modules.telepathy.export import export
    from lightning_modules.telepathy.module import Telepathy

    if options.output is None:
        path = find_file(options.ckpt_path, "--ckpt_path").with_suffix(".safetensors")
    else:
        check_path(options.output, "--output")
        path = Path(options.output)
    if path.suffix != ".safetensors":
        raise UserError(f"--output: {path} must end in .safetensors")
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder, name a file")
    if options.ckpt_path.endswith(".safetensors"):
        raise UserError(f"--ckpt_path: {options.ckpt_path} is exported already")
    content, config = checkpoint(options.ckpt_path, options.config)
    check_folder(path.parent, "--output")
    model, _ = trained(content, config)
    if not isinstance(model, Telepathy):
        raise UserError(
            f"--ckpt_path: {options.ckpt_path} is of {type(model).__name__}, and only Telepathy has a bridge"
        )
    export(model, config["model"], path)
    return path


def _parser() -> PlainParser:
    parser = PlainParser("export", HELP)
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="FILE", help="checkpoint of a run")
    add("--output", metavar="FILE", help="file to write (default: that of the checkpoint, with the end .safetensors)")
    add("--config", action="append", metavar="FILE", help="config of the model, for a checkpoint without one")
    return parser
