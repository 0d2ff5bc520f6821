"""GSM8K-shaped word problems: generated on the fly, from a local jsonl file, or from a data set on the hub."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.answers import final_answer
from datamodules.batch import SupportsCollate, TaskDataModule
from datamodules.batches import Batches, BatchLoader, FiniteBatches, StreamBatches, UnchangedLoader
from datamodules.errors import SEEDS, UserError, check_numbers
from datamodules.problems import Problem, generate, generate_passkey, generate_twins, read_entities
from datamodules.sources import hub_rows, is_broken, reading

HUB_DEFAULT = "openai/gsm8k"
LONGEST = 100_000  # characters of a line, a hundred times a long problem
FIXED = 2000  # problems in each fixed set of the generated source
GENERATORS: dict[str, Callable[[int], Problem]] = {
    "validation": lambda i: generate(0, "validation", i),
    "test": lambda i: generate(0, "test", i),
    "heldout": lambda i: generate(0, "test", i, held_out=True),
    "twin": lambda i: generate_twins(0, "test", i // 2)[i % 2],
    "passkey": lambda i: generate_passkey(0, "test", i),
}


def read_jsonl(path: str | Path, key: str = "data.path") -> list[Problem]:
    """Read problems in GSM8K's form, one `{"question": ..., "answer": ...}` per line.

    Unusable lines are skipped; one warning counts them and describes the first.

    Args:
        path: The file.
        key: The setting that names the file, for error messages.

    Raises:
        UserError: The file cannot be read, or no line is usable.
    """
    problems: list[Problem] = []
    broken: list[str] = []
    # A wrong encoding spoils one line only: its bytes become surrogates, which no question may hold
    with reading(path, key), open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                problems.append(_problem(_parsed(line)))
            except (ValueError, RecursionError) as error:
                broken.append(f"line {number} ({error})")
    if not problems:
        reason = f"first {broken[0]}" if broken else "it is empty"
        raise UserError(f"'{path}' ({key}) holds no problem: {reason}")
    if broken:
        rank_zero_warn(f"'{path}': skipped {len(broken)} of {len(broken) + len(problems)} lines, first {broken[0]}")
    return problems


def _parsed(line: str) -> object:
    if len(line) > LONGEST:
        raise UserError(f"longer than {LONGEST} characters")
    return json.loads(line, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise UserError("a key occurs twice")
    return row


def _problem(row: object) -> Problem:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise UserError("needs the texts 'question' and 'answer'")
    if not row["question"].strip():
        raise UserError("the question is empty")
    if is_broken(row["question"]) or is_broken(row["answer"]):
        raise UserError("not a text in UTF-8, or half of a surrogate pair")
    if final_answer(row["answer"]) is None:
        raise UserError("the answer has no '####'")
    return Problem(row["question"], row["answer"], read_entities(row["question"], row["answer"]))


class WordProblems(TaskDataModule):
    """Word problems with worked answers; the module's `collate` makes the batches.

    A sample is a `Problem`. The module that is trained turns text into tensors: `collate(problems, training)` returns
    the batch (`SupportsCollate`). Without a module, batches are lists of `Problem`. A generated sample::

        question  Oscar has 25 beads and 9 crates of 97 apples. 11 apples break. How many apples are whole?
        answer    Oscar got <<9*97=873>>873 apples.
                  Oscar has <<873-11=862>>862 whole apples.
                  #### 862
        entities  name: Oscar; object: apples; number: 9, 97, 11

    Args:
        source: `generated` on the fly; `jsonl` from `path`; `hub` for a hub data set in GSM8K's form.
        path: The training file of `jsonl`, or the name of the hub data set; None for `openai/gsm8k`.
        test_path: The test file of `jsonl`; None keeps the last tenth of the training file for testing.
        batch_size: Problems per device and step.
        epoch_size: Generated problems per epoch; each epoch draws new ones.
        validation_size: Problems of the validation set: at most 2000 if generated, else at most a tenth of the training
            file, from its end.
        test_sets: Test set -> number of problems. Generated: `test`, `heldout` (name-object and number pairs that
            training never sees), `twin` (pairs that differ in one number) and `passkey` (a string to copy). Other
            sources: `test` only.
        passkey_fraction: Proportion of passkey problems in the generated training stream.
        eval_batch_size: Problems per device and step in validation and test.
        num_workers: Processes that prepare training batches: 0, 1, 2, 4 or 8.
        seed: Seed of the generated training stream, and of the order of problems from files.
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
        test_sets = {"test": 1000} if test_sets is None else test_sets
        sizes = {"validation_size": validation_size} | {f"test_sets.{name}": n for name, n in test_sets.items()}
        super().__init__(batch_size, eval_batch_size, num_workers, epoch_size, sizes)
        check_numbers("data", 0, 1, passkey_fraction=passkey_fraction)
        check_numbers("data", 0, SEEDS, seed=seed)
        if source == "jsonl" and path is None:
            raise UserError("data.source 'jsonl' needs data.path, a file with one problem per line")
        if source != "jsonl" and test_path is not None:
            raise UserError(f"data.test_path is read with data.source 'jsonl' only, not with '{source}'")
        if source == "generated" and path is not None:
            raise UserError("data.path is not read with data.source 'generated': set data.source to 'jsonl' or 'hub'")
        for name, size in sizes.items() if source == "generated" else ():
            if size > FIXED:
                raise UserError(f"data.{name} must be at most {FIXED}, the size of the generated set, not {size}")
        known = [name for name in GENERATORS if name != "validation"] if source == "generated" else ["test"]
        for name in test_sets:
            if name not in known:
                raise UserError(f"data.test_sets has no set '{name}' with data.source '{source}': use one of {known}")
        self.source, self.path, self.test_path, self.seed = source, path, test_path, seed
        self.validation_size, self.test_sets, self.passkey_fraction = validation_size, test_sets, passkey_fraction
        self.train_problems: list[Problem] = []
        self.eval_problems: dict[str, list[Problem]] = {}

    def setup(self, stage: str) -> None:
        """Read or generate the fixed sets, once."""
        if self._module is not None and not isinstance(self._module, SupportsCollate):
            module, task = type(self._module).__name__, type(self).__name__
            raise UserError(f"data: {task} gives problems in words, and {module} reads sequences of tokens")
        if self.eval_problems:
            return
        match self.source:
            case "generated":
                sizes = {"validation": self.validation_size, **self.test_sets}
                self.eval_problems = {name: [GENERATORS[name](i) for i in range(n)] for name, n in sizes.items()}
            case "jsonl":
                assert self.path is not None  # checked by __init__
                train = read_jsonl(self.path)
                if self.test_path:
                    test = read_jsonl(self.test_path, "data.test_path")
                else:
                    train, test = _split(train, max(len(train) // 10, 1), self.path)
                self._keep(train, test)
            case "hub":
                self._keep(self._read_hub("train"), self._read_hub("test"))

    def _read_hub(self, split: str) -> list[Problem]:
        name, problems = self.path or HUB_DEFAULT, []
        for number, row in enumerate(hub_rows(name, "main", split=split, local_source="jsonl"), 1):
            try:
                problems.append(_problem(row))
            except UserError as error:
                raise UserError(f"data.path: row {number} of '{name}', part '{split}': {error}") from error
        return problems

    def _keep(self, train: list[Problem], test: list[Problem]) -> None:
        """Take the validation set from the end of the training problems, and the test set from the test problems."""
        size = max(min(self.validation_size, len(train) // 10), 1)
        self.train_problems, validation = _split(train, size, self.path or HUB_DEFAULT)
        self.eval_problems = {"validation": validation}
        self.eval_problems |= {name: test[:size] for name, size in self.test_sets.items()}

    def train_problem(self, index: int) -> Problem:
        """Return problem `index` of the endless generated training stream."""
        if self.passkey_fraction and (index * 2654435761 % 2**32) / 2**32 < self.passkey_fraction:
            return generate_passkey(self.seed, "train", index)
        return generate(self.seed, "train", index)

    def texts(self, count: int) -> list[str]:
        """Return up to `count` training texts, for instance to train a tokenizer."""
        if self.source == "generated":
            problems = [self.train_problem(i) for i in range(count)]
        else:
            problems = self.train_problems[:count]
        return [f"{problem.question} {problem.answer}" for problem in problems]

    def train_dataloader(self) -> BatchLoader[object]:
        """Return length-bucketed training batches, the same global batches for any number of ranks."""
        size = self.batch_size * self._world
        if self.source != "generated":
            batches: Batches[list[Problem]] = self._finite("training", self.train_problems, size)
        else:
            self._check_epoch(size)
            batches = StreamBatches(self.train_problem, self.epoch_size, size, _length)
        return self._loader(batches, self._collate(training=True), self.num_workers)

    def val_dataloader(self) -> BatchLoader[object]:
        """Return the validation set."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> dict[str, BatchLoader[object]]:
        """Return each test set by its name."""
        return {name: self._eval_loader(name) for name in self.test_sets}

    def predict_dataloader(self) -> UnchangedLoader[object]:
        """Return the first test set."""
        return UnchangedLoader(self._eval_loader(next(iter(self.test_sets), "validation")))

    def sample_dataloader(self, count: int) -> BatchLoader[object]:
        """Return the first `count` validation problems, an unbiased sample for evaluation during training."""
        return self._eval_loader("validation", count)

    def _eval_loader(self, name: str, count: int | None = None) -> BatchLoader[object]:
        batches = self._finite(name, self.eval_problems[name][:count], self.eval_batch_size * self._world)
        return self._loader(batches, self._collate(training=False))

    def _finite(self, name: str, problems: list[Problem], size: int) -> FiniteBatches[Problem]:
        training = name == "training"
        batches = FiniteBatches(problems, size, _length, self.seed if training else 0, drop_last=training)
        self._check_shares(f"{len(problems)} {name} problems", len(batches), batches.smallest)
        return batches

    def _collate(self, training: bool) -> Callable[[list[Problem]], object]:
        return partial(self._module.collate, training=training) if isinstance(self._module, SupportsCollate) else list


def _split(problems: list[Problem], size: int, path: str) -> tuple[list[Problem], list[Problem]]:
    """Separate the last `size` problems from the rest."""
    if len(problems) <= size:
        raise UserError(
            f"'{path}' (data.path) holds too few problems: {len(problems)}, of which {size} are held out and at least "
            "1 is needed for training"
        )
    return problems[:-size], problems[-size:]


def _length(problem: Problem) -> int:
    return len(problem.question) + len(problem.answer)
