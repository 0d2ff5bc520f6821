"""Generators follow from integers alone."""

import subprocess
import sys

import pytest
import torch

from datamodules.errors import UserError
from lightning_modules.core.seeding import check_seed, seeded_generator


def draw(*numbers):
    return torch.rand(4, generator=seeded_generator(*numbers)).tolist()


def test_same_numbers_give_the_same_stream_also_in_another_process():
    code = "import torch; from lightning_modules.core.seeding import seeded_generator as g;"
    code += "print(torch.rand(4, generator=g(3, 1, 4)).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(draw(3, 1, 4)) == str(draw(3, 1, 4))


def test_different_numbers_give_different_streams():
    numbers = [(), (0,), (0, 0), (0, 0, 0, 0, 0), (1,), (1, 0), (0, 1), (2**32,), (2**32, 0), (0, 2**32), (2**64 - 1,)]
    assert len({tuple(draw(*each)) for each in numbers}) == len(numbers)


def test_a_seed_that_is_negative_or_too_large_is_an_error():
    for seed in (0, 2**64 - 1):
        check_seed(seed, "x.seed")
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=rf"^x.seed must be an integer from 0 to 2\^64 - 1, got {seed}"):
            check_seed(seed, "x.seed")
