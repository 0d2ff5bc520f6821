"""Training, validation and test problems from local data or from the hub."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.errors import UserError
from datamodules.problem_files import has_splits, local_rows
from datamodules.problem_rows import Columns, Row, read_problems
from datamodules.problems import Problem
from datamodules.sources import hub_rows

GSM8K_ON_HUB, GSM8K_CONFIG = "openai/gsm8k", "main"
PARTS = ("train", "validation", "test")


@dataclass
class ExternalProblems:
    """Problems that are not generated; the arguments are those of `WordProblems`.

    Raises:
        UserError: The arguments contradict each other, or lack one that is needed.
    """

    source: str
    path: str | None
    test_path: str | None
    columns: Columns
    hub_config: str | None
    splits: dict[str, str] | None

    def __post_init__(self) -> None:
        for part in self.splits or ():
            if part not in PARTS:
                raise UserError(f"data.splits has no '{part}': its keys are 'train', 'validation' and 'test'")
        if self.splits is not None and not {"train", "test"} & {*self.splits}:
            raise UserError("data.splits needs a name for 'train', for 'test' or for both")
        if self.source == "hub" and self.test_path is not None:
            raise UserError("data.test_path is read with data.source 'file' only, set data.splits with 'hub'")
        if self.source == "file":
            if self.hub_config is not None:
                raise UserError("data.hub_config is read with data.source 'hub' only, not with 'file'")
            if self.path is None and self.test_path is None:
                raise UserError("data.source 'file' needs data.path, the training data, or data.test_path, a test set")

    def need_more(self, what: str) -> UserError:
        """Return the error where `what` needs training problems and there are only test problems."""
        advice = f"name the split of 'train' too, data.splits is {self.splits}" if self.splits else "set data.path too"
        return UserError(f"data: {what} needs more than test problems: {advice}")

    def parts(self, validation_size: int) -> tuple[list[Problem], list[Problem], list[Problem]]:
        """Return the training, validation and test problems; the first two are empty where there is only a test set.

        Args:
            validation_size: Largest size of the validation set.

        Raises:
            UserError: The data cannot be read, or are too few.
        """
        train, validation, test = map(self._read, PARTS)
        paths = [path for path in (self.path, self.test_path) if path is not None]
        if self.splits and self.source == "file" and not any(map(has_splits, paths)):
            raise UserError(f"data.splits goes with hub data sets and saved ones with several splits, not '{paths[0]}'")
        if train is None:
            return [], (validation or [])[:validation_size], test or []
        if test is None:
            train, test = self._split(train, max(len(train) // 10, 1))
        if validation is None:
            train, validation = self._split(train, max(min(validation_size, len(train) // 10), 1))
        _tell_overlap(train, {"validation": validation, "test": test})
        return train, validation[:validation_size], test

    def _split(self, problems: list[Problem], size: int) -> tuple[list[Problem], list[Problem]]:
        """Separate the last `size` problems from the rest."""
        if len(problems) <= size:
            raise UserError(
                f"'{self.path or GSM8K_ON_HUB}' (data.path) holds too few problems: {len(problems)}, of which {size} "
                "are held out and at least 1 is needed for training"
            )
        return problems[:-size], problems[-size:]

    def _read(self, part: str) -> list[Problem] | None:
        """Return the problems of a part, or None if the data have no such part."""
        split = (self.splits or {"train": "train", "test": "test"}).get(part)
        if self.source == "hub":
            if split is None:
                return None
            name = self.path or GSM8K_ON_HUB
            return read_problems(self._hub_rows(name, split), f"'{name}' (data.path), split '{split}'", self.columns)
        own = part == "test" and self.test_path is not None
        path, key = (self.test_path, "data.test_path") if own else (self.path, "data.path")
        if path is None or (split is None if has_splits(path) else not own and part != "train"):
            return None
        source = f"'{path}' ({key})" + (f", split '{split}'" if has_splits(path) else "")
        return read_problems(local_rows(path, key, split), source, self.columns)

    def _hub_rows(self, name: str, split: str) -> Iterator[Row]:
        config = self.hub_config or (GSM8K_CONFIG if name == GSM8K_ON_HUB else None)
        rows = hub_rows(name, *filter(None, [config]), split=split, local_source="file")
        return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _tell_overlap(train: list[Problem], held_out: Mapping[str, list[Problem]]) -> None:
    """Warn where held-out problems have the question of a training problem: the same file twice, or a row twice."""
    trained = {problem.question for problem in train}
    for name, problems in held_out.items():
        if shared := sum(problem.question in trained for problem in problems):
            rank_zero_warn(f"data: {shared} of {len(problems)} {name} problems are training problems too")
