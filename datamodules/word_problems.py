"""GSM8K-shaped word problems: generated on the fly, from a local jsonl file, or GSM8K itself from the hub."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.batches import AsGiven, Batches, BatchLoader, FiniteBatches, StreamBatches
from datamodules.errors import UserError
from datamodules.problems import Problem, final_answer, generate, generate_passkey, generate_twins, read_entities

FIXED = 2000  # problems in the fixed validation and test sets of the generated source


def read_jsonl(path: str | Path) -> list[Problem]:
    """Read problems of GSM8K's form, one `{"question": ..., "answer": ...}` a line.

    Lines that cannot be used are skipped, and one warning counts them and names the first.

    Raises:
        UserError: There is no such file.
        UserError: No line can be used.
    """
    if not Path(path).is_file():
        raise UserError(f"no data file at '{path}'")
    problems, broken = [], []
    with open(path, "rb") as lines:  # bytes, so that a wrong encoding spoils its line only
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                problems.append(_problem(json.loads(line)))
            except ValueError as error:
                broken.append(f"line {number} ({error})")
    if not problems:
        raise UserError(f"'{path}' holds no problem: " + (f"first {broken[0]}" if broken else "it is empty"))
    if broken:
        rank_zero_warn(f"'{path}': skipped {len(broken)} of {len(broken) + len(problems)} lines, first {broken[0]}")
    return problems


def _problem(row: dict[str, str]) -> Problem:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise UserError("needs the texts 'question' and 'answer'")
    if final_answer(row["answer"]) is None:
        raise UserError("the answer has no '####'")
    return Problem(row["question"], row["answer"], read_entities(row["question"], row["answer"]))


class WordProblems(LightningDataModule):
    """Word problems with worked answers; batches are made by the module's own `collate`.

    The module that is trained says how text becomes tensors: `collate(problems, training) -> batch`. Without one the
    batches are lists of `Problem`.

    Args:
        source: `generated` on the fly; `jsonl` from `path`; `hub` for a hub data set of GSM8K's form.
        path: The training file for `jsonl`, or the data set's name on the hub (`openai/gsm8k`).
        test_path: The test file for `jsonl`; without it, the last tenth of the training file is kept for testing.
        batch_size: Problems a device and step.
        epoch_size: Generated problems that count as one epoch; each epoch draws new ones.
        validation_size: Problems of the validation set: at most 2000 when generated, else at most the last tenth of the
            training file.
        test_sets: Test set -> problems. Generated: `test`, `heldout` (name-object and number pairs that training
            never sees), `twin` (pairs that differ in one number) and `passkey` (a string to copy). Else `test` only.
        passkey_fraction: Share of passkey problems among those generated for training.
        eval_batch_size: Problems a device and step of validation and test.
        num_workers: Processes that prepare training batches; 0, 1, 2, 4 or 8.
        seed: Which stream of generated problems, and the order of those from files.
    """

    def __init__(
        self,
        source: Literal["generated", "jsonl", "hub"] = "generated",
        path: str | None = None,
        test_path: str | None = None,
        batch_size: int = 64,
        epoch_size: int = 100_000,
        validation_size: int = 500,
        test_sets: dict[str, int] | None = None,
        passkey_fraction: float = 0.0,
        eval_batch_size: int = 250,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if source == "jsonl" and path is None:
            raise UserError("data.source 'jsonl' needs data.path, a file with one problem a line")
        if source != "jsonl" and test_path is not None:
            raise UserError(f"data.test_path is read with data.source 'jsonl' only, not with '{source}'")
        if source == "generated" and path is not None:
            raise UserError("data.path is not read with data.source 'generated': say 'jsonl' or 'hub'")
        self.test_sets = {"test": 1000} if test_sets is None else test_sets
        sizes = {"validation_size": validation_size} | {f"test_sets.{n}": size for n, size in self.test_sets.items()}
        for name, size in {"batch_size": batch_size, "eval_batch_size": eval_batch_size, **sizes}.items():
            if size < 1:
                raise UserError(f"data.{name} must be at least 1, not {size}")
        for name, size in sizes.items() if source == "generated" else ():
            if size > FIXED:
                raise UserError(f"data.{name} must be at most {FIXED}, the size of the generated set, not {size}")
        if num_workers not in (0, 1, 2, 4, 8):
            raise UserError(f"data.num_workers must be 0, 1, 2, 4 or 8, not {num_workers}")
        if epoch_size < batch_size:
            raise UserError(f"data.epoch_size ({epoch_size}) is smaller than data.batch_size ({batch_size})")
        self.source, self.path, self.test_path, self.seed = source, path, test_path, seed
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.epoch_size, self.validation_size, self.passkey_fraction = epoch_size, validation_size, passkey_fraction
        known = ["test", "heldout", "twin", "passkey"] if source == "generated" else ["test"]
        for name in self.test_sets:
            if name not in known:
                raise UserError(f"data.test_sets has no set '{name}' with source '{source}': one of {known}")
        self.train_problems: list[Problem] = []
        self.eval_problems: dict[str, list[Problem]] = {}

    def setup(self, stage: str) -> None:
        """Read or make the fixed sets, once."""
        if self._module and not hasattr(self._module, "collate"):
            reader, own = type(self._module).__name__, type(self).__name__
            raise UserError(f"data: {own} gives problems in words, and {reader} reads sequences of tokens")
        if self.eval_problems:
            return
        match self.source:
            case "generated":
                make = {
                    "validation": lambda i: generate(0, "validation", i),
                    "test": lambda i: generate(0, "test", i),
                    "heldout": lambda i: generate(0, "test", i, held_out=True),
                    "twin": lambda i: generate_twins(0, "test", i // 2)[i % 2],
                    "passkey": lambda i: generate_passkey(0, "test", i),
                }
                sizes = {"validation": self.validation_size, **self.test_sets}
                self.eval_problems = {name: [make[name](i) for i in range(size)] for name, size in sizes.items()}
            case "jsonl":
                train, test = read_jsonl(self.path), self.test_path and read_jsonl(self.test_path)
                if not test:
                    train, test = _split(train, max(len(train) // 10, 1), self.path)
                self._keep(train, test)
            case "hub":
                from datasets import load_dataset  # the import takes seconds, and only the hub needs it

                rows = load_dataset(self.path or "openai/gsm8k", "main")
                self._keep(*([_problem(row) for row in rows[part]] for part in ("train", "test")))

    def _keep(self, train: list[Problem], test: list[Problem]) -> None:
        """Set a file's problems apart: validation is the end of the training file, never part of the test file."""
        size = max(min(self.validation_size, len(train) // 10), 1)
        self.train_problems, validation = _split(train, size, self.path)
        self.eval_problems = {"validation": validation}
        self.eval_problems |= {name: test[:size] for name, size in self.test_sets.items()}

    def train_problem(self, index: int) -> Problem:
        """Return problem `index` of the endless training stream (generated source)."""
        if self.passkey_fraction and (index * 2654435761 % 2**32) / 2**32 < self.passkey_fraction:
            return generate_passkey(self.seed, "train", index)
        return generate(self.seed, "train", index)

    def texts(self, count: int) -> list[str]:
        """Return training texts, for instance to train a tokenizer on."""
        if self.source == "generated":
            problems = [self.train_problem(i) for i in range(count)]
        else:
            problems = self.train_problems[:count]
        return [f"{problem.question} {problem.answer}" for problem in problems]

    def train_dataloader(self) -> BatchLoader:
        """Length-bucketed batches, the same global batch whatever the number of ranks."""
        size = self.batch_size * self._world
        if self.source != "generated":
            return self._loader(self._finite("training", self.train_problems, size), training=True)
        if self.epoch_size < size:
            raise UserError(f"data.epoch_size ({self.epoch_size}) is smaller than a batch of all devices ({size})")
        return self._loader(StreamBatches(self.train_problem, self.epoch_size, size, _length), training=True)

    def val_dataloader(self) -> BatchLoader:
        """The validation set."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> dict[str, BatchLoader]:
        """Test set -> its problems."""
        return {name: self._eval_loader(name) for name in self.test_sets}

    def predict_dataloader(self) -> AsGiven:
        """The problems of the first test set."""
        return AsGiven(self._eval_loader(next(iter(self.test_sets), "validation")))

    def sample_dataloader(self, count: int) -> BatchLoader:
        """The first `count` validation problems: an unbiased sample, for evaluation in passing."""
        return self._eval_loader("validation", count)

    def _eval_loader(self, name: str, count: int | None = None) -> BatchLoader:
        batches = self._finite(name, self.eval_problems[name][:count], self.eval_batch_size * self._world)
        return self._loader(batches, training=False)

    def _finite(self, name: str, problems: list[Problem], size: int) -> FiniteBatches:
        training = name == "training"
        batches = FiniteBatches(problems, size, _length, self.seed if training else 0, drop_last=training)
        if batches.smallest < self._world:
            raise UserError(
                f"data: {len(problems)} {name} problems in {len(batches)} batches leave some of {self._world} devices "
                "without any: use more problems, larger batches or fewer devices"
            )
        return batches

    def _loader(self, batches: Batches, training: bool) -> BatchLoader:
        module = self._module
        collate: Callable[[list[Problem]], Any] = partial(module.collate, training=training) if module else _as_is
        options: dict[str, Any] = {}
        if training and self.num_workers:
            # Forked, since caches and a module's tokenizer and optimizer need not be picklable
            options = {"num_workers": self.num_workers, "prefetch_factor": 4, "multiprocessing_context": "fork"}
            options["persistent_workers"] = True
        return BatchLoader(batches, collate, self._rank, self._world, **options)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _module(self) -> LightningModule | None:
        return self.trainer.lightning_module if self.trainer else None


def _split(problems: list[Problem], size: int, path: str | None) -> tuple[list[Problem], list[Problem]]:
    """Cut the last `size` problems off."""
    if len(problems) <= size:
        raise UserError(f"'{path}' holds too few problems ({len(problems)} to set {size} apart and train on the rest)")
    return problems[:-size], problems[-size:]


def _length(problem: Problem) -> int:
    return len(problem.question) + len(problem.answer)


def _as_is(problems: list[Problem]) -> list[Problem]:
    return problems
