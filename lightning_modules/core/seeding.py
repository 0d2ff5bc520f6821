"""Random generators that are seeded with integers, so that they are the same in every process and on every machine."""

import numpy as np
import torch

from datamodules.errors import SEEDS, UserError


def check_seed(seed: int, setting: str) -> None:
    """Check a seed that a user set.

    Raises:
        UserError: The seed is negative or does not fit into 64 bits; names `setting`.
    """
    if not 0 <= seed <= SEEDS:
        raise UserError(f"{setting} must be an integer from 0 to 2^64 - 1, got {seed}.")


def seeded_generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose seed is a hash of `numbers`, integers from 0 to 2^64 - 1.

    Different numbers, and different counts of numbers, give independent streams. Python's `hash` would not do: it is
    not meant for statistics, and its values may change between versions.
    """
    words = [word for number in numbers for word in divmod(number, 2**32)]
    (seed,) = np.random.SeedSequence([len(numbers), *words]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed))
