"""The draw of a test set: which problem is compared with which others.

Shapes: B problems, Q distinct questions, N groups, G candidates per group.
"""

from collections.abc import Sequence

import numpy as np

from datamodules.problems import Problem
from lightning_modules.telepathy.results import Indices

GROUP = 8  # candidates of the retrieval measure
DRAWN = 256  # problems on which the retrieval measure and the measures of spread are computed


class Draw:
    """A random cycle through the distinct questions of a whole test set, with a fixed seed.

    Problems with the same question have the same place in the cycle, so no problem is compared with itself. The draw
    depends on the problems alone, not on batches or ranks.

    Args:
        problems: The problems, sorted.

    Attributes:
        order_Q: The first problem of each question, in the order of the cycle.
        place_B: The place of each problem's question in the cycle.
    """

    def __init__(self, problems: Sequence[Problem]):
        first: dict[str, int] = {}
        for i, problem in enumerate(problems):
            first.setdefault(problem.question, i)
        self.order_Q: Indices = np.random.default_rng(0).permutation(list(first.values()))
        places = {problems[i].question: place for place, i in enumerate(self.order_Q)}
        self.place_B: Indices = np.array([places[problem.question] for problem in problems])

    def others_B(self, shift: int) -> Indices:
        """Return for each problem the one that is `shift` places further; `shift` must be below Q."""
        others_B: Indices = self.order_Q[(self.place_B + shift) % len(self.order_Q)]
        return others_B

    def groups_NG(self) -> Indices:
        """Return the groups of the retrieval measure; there is none if there are fewer than G questions."""
        drawn = self.order_Q[:DRAWN]
        return drawn[: len(drawn) // GROUP * GROUP].reshape(-1, GROUP)
