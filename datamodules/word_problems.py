"""Word problems with worked answers: generated on the fly, from local files, or from a data set on the hub."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.answers import GSM8K, check_format
from datamodules.batch import SupportsCollate, TaskDataModule
from datamodules.batches import Batches, FiniteBatches, StreamBatches
from datamodules.errors import SEEDS, UserError, check_numbers
from datamodules.external_problems import ExternalProblems
from datamodules.loader import BatchLoader, UnchangedLoader
from datamodules.problem_rows import Columns
from datamodules.problems import Problem, generate, generate_passkey, generate_twins
from datamodules.token_budget import Budget, BudgetedBatches, BudgetedStream, problem_lengths

FIXED = 2000  # problems in each fixed set of the generated source
GENERATORS: dict[str, Callable[[int], Problem]] = {
    "validation": lambda i: generate(0, "validation", i),
    "test": lambda i: generate(0, "test", i),
    "heldout": lambda i: generate(0, "test", i, held_out=True),
    "twin": lambda i: generate_twins(0, "test", i // 2)[i % 2],
    "passkey": lambda i: generate_passkey(0, "test", i),
}


class WordProblems(TaskDataModule):
    """Word problems with worked answers; the module's `collate` makes the batches.

    A sample is a `Problem`. The module that is trained turns text into tensors: `collate(problems, training)` returns
    the batch (`SupportsCollate`). Without a module, batches are lists of `Problem`. A generated sample::

        question  Oscar has 25 beads and 9 crates of 97 apples. 11 apples break. How many apples are whole?
        answer    Oscar got <<9*97=873>>873 apples.
                  Oscar has <<873-11=862>>862 whole apples.
                  #### 862
        entities  name: Oscar; object: apples; number: 9, 97, 11

    Data sets of other forms need one line each::

        source: file, path: train.csv, test_path: test.csv, columns: {question: [Body, Question], answer: Answer}
        source: file, test_path: gsm_hard.parquet, columns: {question: input, answer: target}
        source: hub, path: owner/name, hub_config: main, splits: {train: train, test: validation}

    An answer may be a bare number, also as text with a unit, such as `9 (apples)`; its worked answer is then `#### 9`.
    Rows that cannot be used are skipped; one warning counts them and describes the first.

    Args:
        source: `generated` on the fly; `file`, local data from `path` and `test_path`; `hub` for a hub data set.
        path: The training data of `file`: JSON lines, or a file that ends in `.json`, `.csv`, `.tsv` or `.parquet`, or
            a folder of `datasets.save_to_disk`. Without it, there is only a test. The name of the data set of `hub`;
            None for `openai/gsm8k`.
        test_path: The test data of `file`. Without it, the test data are the split of a saved data set, or the last
            tenth of the training data.
        columns: `question` and `answer` -> their columns in the data; several columns of a question are joined by a
            space.
        hub_config: The configuration of the hub data set, if it has several.
        splits: `train`, `validation` and `test` -> their names in a data set of the hub or a saved one with several.
            Without `train` there is only a test, without `test` it is the last tenth of the training data.
        answer_format: How outputs mark the final answer: `gsm8k`, after `####`; `last_number`; or a regular expression
            with one group (see `answers.final_answer`).
        batch_size: Problems per device and step; with `max_tokens` the most of them.
        max_tokens: Tokens per device and step, padding included. A batch then has as many problems of similar length as
            fit: their number times the longest of their rows is at most `max_tokens`.
        epoch_size: Generated problems per epoch, with `max_tokens` about; each epoch draws new ones.
        validation_size: Problems of the validation set: at most 2000 if generated, else at most a tenth of the training
            data, from their end.
        test_sets: Test set -> number of problems. Generated: `test`, `heldout` (first name with first object, and
            first two numbers, that training never has in these places), `twin` (pairs that differ in one number) and
            `passkey` (a string to copy). Other sources: `test` only.
        passkey_fraction: Proportion of passkey problems in the generated training stream.
        eval_batch_size: Problems per device and step in validation and test.
        num_workers: Processes that prepare training batches: 0, 1, 2, 4 or 8.
        seed: Seed of the generated training stream, and of the order of other problems.
    """

    def __init__(
        self,
        source: Literal["generated", "file", "hub", "jsonl"] = "generated",
        path: str | None = None,
        test_path: str | None = None,
        columns: dict[str, str | list[str]] | None = None,
        hub_config: str | None = None,
        splits: dict[str, str] | None = None,
        answer_format: str = GSM8K,
        batch_size: int = 64,
        max_tokens: int | None = None,
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
        check_numbers("data", 1, max_tokens=max_tokens)
        check_format(answer_format)
        if source == "jsonl":
            rank_zero_warn("data.source 'jsonl' is now named 'file'; the old name still works", category=FutureWarning)
            source = "file"
        for name, size in sizes.items() if source == "generated" else ():
            if size > FIXED:
                raise UserError(f"data.{name} must be at most {FIXED}, the size of the generated set, not {size}")
        known = [name for name in GENERATORS if name != "validation"] if source == "generated" else ["test"]
        if not test_sets:
            raise UserError(f"data.test_sets is empty: name at least one of {known}, or leave the key out")
        for name in test_sets:
            if name not in known:
                raise UserError(f"data.test_sets has no set '{name}' with data.source '{source}': use one of {known}")
        self.external: ExternalProblems | None = None
        given = {"path": path, "test_path": test_path, "columns": columns, "hub_config": hub_config, "splits": splits}
        if source == "generated":
            for name, value in given.items():
                if value is not None:
                    raise UserError(f"data.{name} is not read with data.source 'generated', but with 'file' or 'hub'")
        else:
            self.external = ExternalProblems(
                source, path, test_path, Columns.from_settings(columns or {}, answer_format), hub_config, splits
            )
        self.answer_format, self.seed, self.max_tokens = answer_format, seed, max_tokens
        self.validation_size, self.test_sets, self.passkey_fraction = validation_size, test_sets, passkey_fraction
        self.train_problems: list[Problem] = []
        self.eval_problems: dict[str, list[Problem]] = {}

    def setup(self, stage: str) -> None:
        """Read or generate the fixed sets, once.

        Raises:
            UserError: The data cannot be read, or have no problems for this stage.
        """
        if self._module is not None and not isinstance(self._module, SupportsCollate):
            module, task = type(self._module).__name__, type(self).__name__
            raise UserError(f"data: {task} gives problems in words, and {module} reads sequences of tokens")
        if not self.eval_problems and self.external:
            self.train_problems, validation, test = self.external.parts(self.validation_size)
            self.eval_problems = {"validation": validation} if validation else {}
            self.eval_problems |= {name: test[:size] for name, size in self.test_sets.items()}
        elif not self.eval_problems:
            sizes = {"validation": self.validation_size, **self.test_sets}
            self.eval_problems = {
                name: [self._in_format(GENERATORS[name](i)) for i in range(n)] for name, n in sizes.items()
            }
        lacking = {"fit": not self.train_problems, "validate": "validation" not in self.eval_problems}
        for command, lacks in lacking.items():
            if stage == command and lacks and self.external:
                raise self.external.need_more(command)

    def answers(self) -> list[str]:
        """Return the worked answers of all evaluation sets, and of the training problems unless they are generated."""
        sets = [self.train_problems, *self.eval_problems.values()]
        return [problem.answer for problems in sets for problem in problems]

    def questions(self) -> list[str] | None:
        """Return the questions of all sets; None if training draws new ones without an end."""
        if self.external is None:
            return None
        sets = [self.train_problems, *self.eval_problems.values()]
        return [problem.question for problems in sets for problem in problems]

    def _in_format(self, problem: Problem) -> Problem:
        problem.answer_format = self.answer_format
        return problem

    def train_problem(self, index: int) -> Problem:
        """Return problem `index` of the endless generated training stream."""
        if self.passkey_fraction and (index * 2654435761 % 2**32) / 2**32 < self.passkey_fraction:
            return self._in_format(generate_passkey(self.seed, "train", index))
        return self._in_format(generate(self.seed, "train", index))

    def texts(self, count: int) -> list[str]:
        """Return up to `count` training texts, for instance to train a tokenizer."""
        if self.external and not self.train_problems:
            raise self.external.need_more("a new tokenizer")
        problems = self.train_problems[:count] if self.external else [self.train_problem(i) for i in range(count)]
        return [f"{problem.question} {problem.answer}" for problem in problems]

    def train_dataloader(self) -> BatchLoader[object]:
        """Return length-bucketed training batches, the same global batches for any number of ranks."""
        batches = self._training_batches() if self.max_tokens is None else self._budgeted(self.max_tokens)
        return self._train_loader(batches, self._collate(training=True))

    def _training_batches(self) -> Batches[list[Problem]]:
        size = self.batch_size * self._world
        if self.external:
            return self._finite("training", self.train_problems, size)
        self._check_epoch(size)
        return StreamBatches(self.train_problem, self.epoch_size, size, _length)

    def _budgeted(self, max_tokens: int) -> Batches[list[Problem]]:
        parts = partial(problem_lengths, self._module, max_tokens), Budget(max_tokens, self.batch_size), self._world
        if self.external is None:
            stream = BudgetedStream(self.train_problem, self.epoch_size, *parts)
            self._check_epoch(stream.rows)
            return stream
        fixed = BudgetedBatches(self.train_problems, *parts, self.seed)
        self._check_shares(f"{len(self.train_problems)} training problems", len(fixed), fixed.smallest)
        return fixed

    def val_dataloader(self) -> BatchLoader[object]:
        """Return the validation set."""
        batches = self._overfit(self._evaluation("validation"))
        return self._loader(batches, self._collate(training=False))

    def test_dataloader(self) -> dict[str, BatchLoader[object]]:
        """Return each test set by its name."""
        return {name: self._eval_loader(name) for name in self.test_sets}

    def predict_dataloader(self) -> UnchangedLoader[object]:
        """Return the first test set."""
        return UnchangedLoader(self._eval_loader(next(iter(self.test_sets))))

    def sample_dataloader(self, count: int) -> BatchLoader[object]:
        """Return the first `count` validation problems, an unbiased sample for evaluation during training."""
        return self._eval_loader("validation", count)

    def _eval_loader(self, name: str, count: int | None = None) -> BatchLoader[object]:
        return self._loader(self._evaluation(name, count), self._collate(training=False))

    def _evaluation(self, name: str, count: int | None = None) -> Batches[list[Problem]]:
        return self._finite(name, self.eval_problems[name][:count], self.eval_batch_size * self._world)

    def _finite(self, name: str, problems: list[Problem], size: int) -> FiniteBatches[Problem]:
        training = name == "training"
        batches = FiniteBatches(problems, size, _length, self.seed if training else 0, training, self._world)
        self._check_shares(f"{len(problems)} {name} problems", len(batches), batches.smallest)
        return batches

    def _collate(self, training: bool) -> Callable[[list[Problem]], object]:
        return partial(self._module.collate, training=training) if isinstance(self._module, SupportsCollate) else list


def _length(problem: Problem) -> int:
    return len(problem.question) + len(problem.answer)
