"""The command `generate`: text from the checkpoint of a sequence model."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cli.plain_parser import PlainParser

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

HELP = """Continue a text with a model that a run has trained, one token after another.

The model and its vocabulary come from the checkpoint. Models with a recurrent state, such as Phase, take no more memory
and time per token the longer the text is.

  python main.py generate --ckpt_path runs/phase_tpi/<run>/checkpoints/last.ckpt --prompt "The "
"""


def run(line: list[str]) -> None:
    """Run a command line; a user's mistake is answered by a sentence, with exit code 2.

    Args:
        line: The command line behind `generate`.
    """
    options = _parser().parse_args(line)
    try:
        for piece in generated(options):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except Exception as error:
        from cli.user_errors import host_message, user_message

        if not (sentence := user_message(error) or host_message(error)):
            raise
        sys.stderr.write(f"error: {sentence}\n")
        sys.exit(2 if user_message(error) else 1)
    sys.stdout.write("\n")


def generated(options: Namespace) -> Iterator[str]:
    """Yield the prompt, then its continuation in pieces of at least one character.

    Raises:
        UserError: The checkpoint cannot be used, the model cannot generate, or the prompt does not suit it.
    """
    from lightning_modules.core.generation import Sampling
    from lightning_modules.core.seeding import check_seed, seeded_generator
    from lightning_modules.core.text_stream import stream_text

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    check_seed(options.seed, "--seed")
    model, data = _load(options)
    network, tokens_BT = _prompt(options.prompt, model, data, options.ckpt_path)
    yield options.prompt
    generator = seeded_generator(options.seed)
    yield from stream_text(network, tokens_BT, options.max_new_tokens, data.decode, sampling, generator)


def _parser() -> PlainParser:
    parser = PlainParser("generate", HELP)
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="FILE", help="checkpoint of a run")
    add("--prompt", required=True, metavar="TEXT", help="text to continue")
    add("--max_new_tokens", type=int, default=500, metavar="N", help="tokens to add (default 500)")
    heat = "divides the logits (default 0.8); 0 takes the most likely token, larger values are more random"
    add("--temperature", type=float, default=0.8, metavar="X", help=heat)
    add("--top_k", type=int, metavar="N", help="sample among the N most likely tokens (default: all)")
    nucleus = "sample among the fewest tokens whose probabilities add up to X (default: all)"
    add("--top_p", type=float, metavar="X", help=nucleus)
    add("--seed", type=int, default=0, metavar="N", help="seed of the samples (default 0)")
    config = "config of the model, for a checkpoint without one, such as members/<seed>.ckpt of an ensemble"
    add("--config", action="append", metavar="FILE", help=config)
    return parser


def _load(options: Namespace) -> tuple["LightningModule", Any]:
    """Return the model with the checkpoint's weights, and the data with its vocabulary."""
    from cli.checkpoint_fit import misfit_of_parameters
    from datamodules.errors import UserError
    from lightning_modules.core.checkpoints import check_finite, read_checkpoint, saved_config

    path = options.ckpt_path
    content = read_checkpoint(path, "--ckpt_path")
    check_finite(content, "--ckpt_path", path)
    config = saved_config(content)
    if options.config:
        from cli.resolver import Resolver

        config = Resolver(["predict", *(text for file in options.config for text in ("--config", file))]).resolved
    if not {"model", "data"} <= config.keys():
        raise UserError(f"--ckpt_path: {path} holds no config of a run: name it with --config")
    model, data = _build(config)
    if misfit := misfit_of_parameters(content, model):
        raise UserError(f"--ckpt_path: the checkpoint does not fit the config: {misfit}")
    model.load_state_dict(content["state_dict"])
    if state := content.get(type(data).__qualname__):
        data.load_state_dict(state)
    return model.eval(), data


def _build(config: dict[str, Any]) -> "tuple[LightningModule, LightningDataModule]":
    """Return the model and the data of a resolved config."""
    from lightning.pytorch import LightningDataModule, LightningModule

    from cli import renames
    from cli.app import RunParser
    from cli.trainer import build

    parser = RunParser(prog="main.py generate")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.add_instantiator(build, object)
    parsed = parser.parse_object({key: renames.renamed(config[key]) for key in ("model", "data")})
    built = parser.instantiate_classes(parsed)
    return built.model, built.data


def _prompt(text: str, model: "LightningModule", data: Any, path: str) -> tuple[Any, Any]:
    """Return the network that generates, and the tokens of the prompt, [1, T]."""
    import torch

    from datamodules.errors import UserError
    from datamodules.sequence_task import SequenceTask
    from lightning_modules.core.contracts import HasCharacters, StatefulNetwork
    from lightning_modules.core.ensemble_module import EnsembleModule
    from lightning_modules.core.text_stream import Vocabulary

    kind = type(model).__name__
    if not isinstance(model, EnsembleModule) or not isinstance(data, SequenceTask):
        raise UserError(f"--ckpt_path: {path} is of {kind}, which is no sequence model: try Phase or GroundThink")
    if model.ensemble > 1:
        advice = "fit with --model.save_members true, and name one of members/<seed>.ckpt with --config"
        raise UserError(f"--ckpt_path: {path} holds {model.ensemble} members, and generate takes one: {advice}")
    if not isinstance(model.network, StatefulNetwork):
        raise UserError(f"--ckpt_path: {path} is of {kind}, which cannot run one token at a time")
    if isinstance(data, HasCharacters) and (unknown := data.unknown_characters(text)):
        listed = " ".join(map(repr, unknown))
        raise UserError(f"--prompt: the vocabulary of the model lacks {listed}: leave out what its text did not have")
    tokens = data.parse(text)
    if not tokens:
        raise UserError("--prompt is empty: give at least one character to continue")
    return Vocabulary(model.network, data.vocab_size), torch.tensor([tokens])
