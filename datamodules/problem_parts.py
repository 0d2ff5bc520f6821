"""Parts of generated word problems: names, objects with their categories, numbers, and the template type."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Numbers = dict[str, int]

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

_NAMES = """
Abigail Adam Aisha Alan Alice Amara Amir Anna Arjun Astrid Ava Ben Bianca Boris Brenda Bruno Carla Carlos Cecilia
Chen Clara Colin Daisy Dana Daniel David Delia Diego Dora Edith Elena Eli Emil Emma Erik Esther Eva Farah Felix
Fiona Frank Freya George Gina Grace Greta Hana Harold Hassan Heidi Helen Henry Hugo Ida Igor Ingrid Irene Isaac Ivan
Ivy Jack James Janet Jasmin Joel Julia Kamal Karen Keiko Kevin Kofi Laila Laura Leo Liam Linda Lucas Luna Marco
Maria Martha Mateo Maya Milan Mira Nadia Naomi Nina Noah Nora Oleg Olga Omar Oscar Paul Petra Priya Quinn Rahul Rita
Robin Rosa Ruth Sam Sara Sofia Tara Tariq Thomas Tom Uma Vera Victor Walter Wendy Xavier Yara Yusuf Zara Zoe
"""

CATEGORIES = {  # of objects
    "food": """
        apples bananas berries cakes carrots cherries cookies eggs figs grapes lemons melons nuts onions oranges peaches
        pears pies plums potatoes
    """,
    "nature": """
        acorns daisies feathers flowers leaves lilies pebbles plants rocks roses seeds shells stones tulips
    """,
    "clothing": "belts buttons caps coats gloves hats masks scarves shirts shoes socks",
    "jewellery": "beads coins gems jewels necklaces rings",
    "containers": "bags baskets bottles boxes buckets envelopes jars trays vases",
    "tableware": "bowls cups forks glasses knives mugs plates spoons",
    "stationery": """
        books brushes cards clips crayons erasers letters maps notebooks paints pencils pens photos postcards rulers
        sketches stamps stickers tickets
    """,
    "hardware": "bolts bricks hammers hooks ladders magnets nails ropes tiles wheels",
    "toys": "arrows balloons bells boats dolls drums flags kites marbles paddles puzzles toys whistles",
    "household": """
        badges blankets candles chairs clocks combs cones corks doors frames keys lamps mirrors needles pillows pins
        ribbons straws towels
    """,
}

NAMES = tuple(_NAMES.split())
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words.split()}
OBJECTS = tuple(sorted(CATEGORY_OF))  # the order is part of the draw of the problems


@dataclass(frozen=True)
class Template:
    """The text of one kind of problem, with fields for names, objects and numbers.

    Attributes:
        name: Name of the template, for results by template.
        draw: Draws the numbers from a random generator.
        questions: Paraphrases of the question.
        steps: The steps of the answer, each (sentence, expression, name of the result). An expression is two names of
            numbers with a sign between them, such as `a+b`. The last result is the final answer.
    """

    name: str
    draw: Callable[[Random], Numbers]
    questions: tuple[str, ...]
    steps: tuple[tuple[str, str, str], ...]

    def work(self, numbers: Numbers) -> Numbers | None:
        """Return the numbers with all results, or None if the numbers do not make a sensible problem.

        They do if every number and result is at least 2, so that nobody gives away more than they have, and all
        divisions are exact.
        """
        if min(numbers.values()) < 2:
            return None
        values = dict(numbers)
        for _, expression, result in self.steps:
            left, sign, right = tuple(expression)
            if sign == "/" and values[left] % values[right]:
                return None
            values[result] = OPERATIONS[sign](values[left], values[right])
            if values[result] < 2:
                return None
        return values


def between(**bounds: tuple[int, int]) -> Callable[[Random], Numbers]:
    """Return a function that draws each number between its bounds, both included."""
    return lambda rng: {name: rng.randint(low, high) for name, (low, high) in bounds.items()}


def multiple(**bounds: tuple[int, int]) -> Callable[[Random], Numbers]:
    """Return a function that draws like `between` and then multiplies `a` by `b`, so that a / b is exact."""
    draw_factors = between(**bounds)

    def draw(rng: Random) -> Numbers:
        numbers = draw_factors(rng)
        return numbers | {"a": numbers["a"] * numbers["b"]}

    return draw


def sum_divides(rng: Random) -> Numbers:
    """Draw a, b and c such that (a + b) / c is exact."""
    c, share = rng.randint(2, 9), rng.randint(12, 90)
    a = rng.randint(5, c * share - 5)
    return {"a": a, "b": c * share - a, "c": c}


def boxes_shared(rng: Random) -> Numbers:
    """Draw a, b, c and d such that (a * b - c) / d is exact."""
    while True:
        a, b, d, share = rng.randint(3, 9), rng.randint(20, 60), rng.randint(2, 6), rng.randint(10, 80)
        if (c := a * b - d * share) >= 3:
            return {"a": a, "b": b, "c": c, "d": d}
