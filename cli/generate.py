"""The command `generate`: text from the checkpoint of a sequence model."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.plain_parser import PlainParser, mistakes_in_words

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_modules.core.contracts import SupportsQuestions

HELP = """Continue a text with a model that a run has trained, one token after another, or answer questions.

The model and its vocabulary come from the checkpoint. Models with a recurrent state, such as Phase, take no more memory
and time per token the longer the text is.

  python main.py generate --ckpt_path runs/phase_tpi/<run>/checkpoints/last.ckpt --prompt "The "

Telepathy answers the prompt, or each line of --file, greedily. Its checkpoint may also be a file of `export`.

  python main.py generate --ckpt_path runs/telepathy_v16/<run>/checkpoints/last.ckpt --file questions.txt
"""

ROWS = 16  # questions at a time
TEMPERATURE = 0.8


def run(line: list[str]) -> None:
    """Run a command line; a user's mistake is answered by a sentence, with exit code 2.

    Args:
        line: The command line behind `generate`.
    """
    options = _parser().parse_args(line)
    with mistakes_in_words():
        for piece in generated(options):
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")


def generated(options: Namespace) -> Iterator[str]:
    """Yield the prompt, then its continuation in pieces of at least one character; or answers, of a model of questions.

    Raises:
        UserError: The checkpoint cannot be used, the model cannot generate, or the prompt does not suit it.
    """
    from cli.loaded import load
    from datamodules.errors import UserError, check_numbers
    from lightning_modules.core.contracts import SupportsQuestions
    from lightning_modules.core.generation import Sampling
    from lightning_modules.core.seeding import check_seed, seeded_generator
    from lightning_modules.core.text_stream import stream_text

    try:
        temperature = TEMPERATURE if options.temperature is None else options.temperature
        sampling = Sampling(temperature, options.top_k, options.top_p)
    except UserError as error:
        raise UserError(f"--{error}") from error
    check_seed(options.seed, "--seed")
    check_numbers("--", 1, max_new_tokens=options.max_new_tokens)
    if any("\ud800" <= character <= "\udfff" for character in options.prompt or ""):  # Python's stand-ins for bytes
        raise UserError("--prompt is no text in UTF-8")
    questions = [options.prompt] if options.file is None else _lines(options.file)
    model, data = load(options.ckpt_path, options.config)
    if isinstance(model, SupportsQuestions):
        if options.member is not None:
            raise UserError(f"--member: {options.ckpt_path} holds one model, and no ensemble")
        if sampled := [name for name in ("temperature", "top_k", "top_p") if getattr(options, name) is not None]:
            raise UserError(f"--{sampled[0]}: {type(model).__name__} takes the most likely token: leave it out")
        if not questions[0].strip():
            raise UserError("--prompt is empty: give a question")
        yield from _answers(model, questions, options)
        return
    if options.prompt is None:
        raise UserError(f"--file: {type(model).__name__} answers no questions: give it a --prompt to continue")
    network, tokens_BT = _prompt(options, model, data)
    yield options.prompt
    generator = seeded_generator(options.seed)
    yield from stream_text(network, tokens_BT, options.max_new_tokens, data.decode, sampling, generator)


def _parser() -> PlainParser:
    parser = PlainParser("generate", HELP)
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="FILE", help="checkpoint of a run")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="text to continue, or question to answer")
    questions = "questions to answer, one per line; the answers are printed as lines of JSON"
    text.add_argument("--file", metavar="FILE", help=questions)
    add("--max_new_tokens", type=int, default=500, metavar="N", help="tokens to add (default 500)")
    heat = f"divides the logits (default {TEMPERATURE}); 0 takes the most likely token, larger values are more random"
    add("--temperature", type=float, metavar="X", help=heat)
    add("--top_k", type=int, metavar="N", help="sample among the N most likely tokens (default: all)")
    nucleus = "sample among the fewest tokens whose probabilities add up to X (default: all)"
    add("--top_p", type=float, metavar="X", help=nucleus)
    add("--seed", type=int, default=0, metavar="N", help="seed of the samples (default 0)")
    add("--member", type=int, metavar="N", help="which member of an ensemble, from 0")
    config = "config of the model, for a checkpoint without one, such as members/<seed>.ckpt of an ensemble"
    add("--config", action="append", metavar="FILE", help=config)
    return parser


def _answers(model: "SupportsQuestions", questions: list[str], options: Namespace) -> Iterator[str]:
    """Yield the answer to the prompt, or a line of JSON for each question of the file."""
    if options.file is None:
        yield model.answer(questions, options.max_new_tokens)[0]
        return
    for start in range(0, len(questions), ROWS):
        some = questions[start : start + ROWS]
        for question, answer in zip(some, model.answer(some, options.max_new_tokens), strict=True):
            yield json.dumps({"question": question, "answer": answer}, ensure_ascii=False) + "\n"


def _lines(path: str) -> list[str]:
    from datamodules.errors import UserError

    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UserError(f"--file: {path} cannot be read: {reason}") from error
    if not any(lines):
        raise UserError(f"--file: {path} holds no question")
    return [line for line in lines if line]


def _prompt(options: Namespace, model: "LightningModule", data: Any) -> tuple[Any, Any]:
    """Return the network that generates, and the tokens of the prompt, [1, T]."""
    import torch
    from lightning.pytorch.utilities import rank_zero_warn

    from datamodules.errors import UserError, check_numbers
    from datamodules.mixture import main_task
    from datamodules.sequence_task import SequenceTask
    from lightning_modules.core.contracts import HasCharacters, StatefulNetwork
    from lightning_modules.core.sequence_model import SequenceModel
    from lightning_modules.core.text_stream import Vocabulary

    text, path, kind = options.prompt, options.ckpt_path, type(model).__name__
    if not isinstance(model, SequenceModel) or not isinstance(data, SequenceTask):
        raise UserError(f"--ckpt_path: {path} is of {kind}, which is no sequence model: try Phase or GroundThink")
    if options.member is None and model.ensemble > 1:
        advice = f"add --member with a number from 0 to {model.ensemble - 1}"
        raise UserError(f"--ckpt_path: {path} holds {model.ensemble} members, and generate takes one: {advice}")
    check_numbers("--", 0, model.ensemble - 1, member=options.member)
    network = model.member_network(options.member or 0)
    if not isinstance(network, StatefulNetwork):
        raise UserError(f"--ckpt_path: {path} is of {kind}, which cannot run one token at a time")
    task = main_task(data)
    assert isinstance(task, SequenceTask)
    if isinstance(task, HasCharacters) and (unknown := task.unknown_characters(text)):
        listed = " ".join(map(repr, unknown))
        raise UserError(f"--prompt: the vocabulary of the model lacks {listed}: leave out what its text did not have")
    try:
        tokens = task.parse(text)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from error
    if not tokens:
        raise UserError("--prompt is empty: give at least one character to continue")
    if not task.predicts_next and options.max_new_tokens > 1:
        learned = f"{type(task).__name__} has labels that are answers, so {kind} has learned to continue by one token"
        rank_zero_warn(f"--max_new_tokens: {learned}; the others mean nothing")
    return Vocabulary(network, task.vocab_size), torch.tensor([tokens])
