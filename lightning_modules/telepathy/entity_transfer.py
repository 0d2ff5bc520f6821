"""Which names, objects and numbers of the answers arrive, and of which category wrong objects are, beyond chance.

Shapes: B problems.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from datamodules.problem_parts import CATEGORY_OF
from datamodules.problems import objects_in
from lightning_modules.core.intervals import wilson_interval
from lightning_modules.telepathy.draw import Draw
from lightning_modules.telepathy.results import Array, Indices, Measures, ProblemResult, bootstrap

SHIFTS = 8  # derangements over which the chance level of entity transfer is averaged


def add_entity_transfer(results: list[ProblemResult], draw: Draw, measures: Measures) -> None:
    """Add e* = (e - e0) / (1 - e0), where e is the share of an answer's names, objects and numbers that the output has.

    An entity counts if the output has it as a whole word. e0 is the chance level: the same share in the outputs for
    other questions. The measures are `entity_recall` (e), `entity_chance` (e0) and `entity_transfer` (e*), over all
    entities and, with a suffix, for each type.
    """
    count, questions = len(results), len(draw.order_Q)
    if questions < 2:
        return

    def tally(output_of: Sequence[int]) -> dict[str, Array]:
        """Return type -> (entities found, entities) of each problem, in the output of another problem."""
        tallies: dict[str, Array] = {}
        for i, j in enumerate(output_of):
            for kind, found in results[i].problem.entity_hits(results[j].answers["bridge"].text).items():
                if found:
                    tallies.setdefault(kind, np.zeros((count, 2)))[i] = sum(found), len(found)
        return tallies

    recalled = tally(range(count))
    others = [tally(draw.others_B(shift).tolist()) for shift in range(1, min(SHIFTS, questions - 1) + 1)]
    chance = {kind: np.sum([other[kind] for other in others], axis=0) / len(others) for kind in recalled}
    if not recalled:
        return
    recalled["all"], chance["all"] = (np.sum(list(table.values()), axis=0) for table in (recalled, chance))
    for kind, found_B2 in recalled.items():
        suffix = "" if kind == "all" else f"_{kind}"
        entities, answers = found_B2[:, 1].sum(), int((found_B2[:, 1] > 0).sum())
        e_star = partial(_chance_corrected, found_B2, chance[kind])
        measures.add(f"entity_recall{suffix}", found_B2[:, 0].sum() / entities, answers)
        measures.add(f"entity_chance{suffix}", chance[kind][:, 0].sum() / entities, answers)
        measures.add(f"entity_transfer{suffix}", e_star(np.arange(count)), answers, bootstrap(count, e_star))


def add_category_transfer(results: list[ProblemResult], draw: Draw, measures: Measures) -> None:
    """Add (s - s0) / (1 - s0), where s is the share of wrong objects that are of the right object's category.

    `Problem.wrong_object` says what a wrong object is. s0 is the chance level: the mean over these problems of the same
    share among the wrong objects in the outputs for other questions. An object that the problem's own question names is
    not among them, since it would not be a wrong object here. So s0 follows how often each object is written, and a
    bridge that gives one object to every question has s = s0.

    The measures are `category_share` (s), `category_chance` (s0) and `category_transfer`. The interval of the last is
    the Wilson interval of s, with s0 held fixed. A problem counts if other questions give a wrong object to compare
    with. The measures are absent if no problem counts, and `category_transfer` is also absent if s0 is 1.
    """
    wrong = {i: word for i, r in enumerate(results) if (word := r.problem.wrong_object(r.answers["bridge"].text))}
    written, of_question = Counter(wrong.values()), dict[int, Counter[str]]()
    for i, word in wrong.items():
        of_question.setdefault(int(draw.place_B[i]), Counter())[word] += 1
    hits: list[bool] = []
    chances: list[float] = []
    for i, word in wrong.items():
        problem = results[i].problem
        others = written - of_question[int(draw.place_B[i])]
        for known in objects_in(problem.question):
            del others[known]
        if others:
            same = sum(times for other, times in others.items() if CATEGORY_OF[other] == problem.category)
            hits.append(CATEGORY_OF[word] == problem.category)
            chances.append(same / others.total())
    if not hits:
        return
    share, chance = sum(hits) / len(hits), sum(chances) / len(chances)
    measures.add_proportion("category_share", hits)
    measures.add("category_chance", chance, len(hits))
    if chance < 1:
        value, low, high = ((s - chance) / (1 - chance) for s in (share, *wilson_interval(sum(hits), len(hits))))
        measures.add("category_transfer", value, len(hits), (low, high))


def _chance_corrected(found_B2: Array, chance_B2: Array, indices: Indices) -> float:
    total = max(found_B2[indices, 1].sum(), 1)
    e, e0 = found_B2[indices, 0].sum() / total, chance_B2[indices, 0].sum() / total
    return float((e - e0) / (1 - e0)) if e0 < 1 else 0.0
