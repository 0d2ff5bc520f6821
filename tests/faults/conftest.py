"""The interpreter that starts the runs of these tests."""

from collections.abc import Iterator

import pytest
from zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Return an interpreter that has imported the program."""
    made = Zygote()
    yield made
    made.close()
