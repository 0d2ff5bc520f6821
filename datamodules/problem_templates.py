"""The sentences of generated word problems: names, objects and nineteen templates of one to three steps.

A template draws its numbers, says when they are admissible, and lists paraphrases of the question and the
steps of the answer. A step is `(sentence, expression, result)`: `{=}` in the sentence becomes the worked
expression in GSM8K's form, `<<12+30=42>>42`, and later steps may use the result by its name.

Fields: {n} and {m} two people, {k} a third, {o} an object, {p} another object, {a} to {e} numbers, {x} to {z} results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Numbers = dict[str, int]

NAMES = tuple(
    """Abigail Adam Aisha Alan Alice Amara Amir Anna Arjun Astrid Ava Ben Bianca Boris Brenda Bruno Carla Carlos Cecilia
    Chen Clara Colin Daisy Dana Daniel David Delia Diego Dora Edith Elena Eli Emil Emma Erik Esther Eva Farah Felix Fiona
    Frank Freya George Gina Grace Greta Hana Harold Hassan Heidi Helen Henry Hugo Ida Igor Ingrid Irene Isaac Ivan Ivy
    Jack James Janet Jasmin Joel Julia Kamal Karen Keiko Kevin Kofi Laila Laura Leo Liam Linda Lucas Luna Marco Maria
    Martha Mateo Maya Milan Mira Nadia Naomi Nina Noah Nora Oleg Olga Omar Oscar Paul Petra Priya Quinn Rahul Rita Robin
    Rosa Ruth Sam Sara Sofia Tara Tariq Thomas Tom Uma Vera Victor Walter Wendy Xavier Yara Yusuf Zara Zoe""".split()
)

OBJECTS = tuple(
    """acorns apples arrows badges bags balloons bananas baskets beads bells belts berries blankets boats bolts books
    bottles bowls boxes bricks brushes buckets buttons cakes candles caps cards carrots chairs cherries clips clocks coats
    coins combs cones cookies corks crayons cups daisies dolls doors drums eggs envelopes erasers feathers figs flags
    flowers forks frames gems glasses gloves grapes hammers hats hooks jars jewels keys kites knives ladders lamps leaves
    lemons letters lilies magnets maps marbles masks melons mirrors mugs nails necklaces needles notebooks nuts onions
    oranges paddles paints peaches pears pebbles pencils pens photos pies pillows pins plants plates plums postcards
    potatoes puzzles ribbons rings rocks ropes roses rulers scarves seeds shells shirts shoes sketches socks spoons
    stamps stickers stones straws tickets tiles towels toys trays tulips vases wheels whistles""".split()
)


@dataclass(frozen=True)
class Template:
    """One shape of problem.

    Attributes:
        name: Its name, for results by template.
        draw: Draws the numbers from a random generator.
        admissible: Whether a set of numbers makes sense (exact division, nobody gives away what they lack).
        questions: Paraphrases of the question.
        steps: `(sentence, expression, result name)` of the answer; the last result is the final answer.
    """

    name: str
    draw: Callable[[Random], Numbers]
    admissible: Callable[[Numbers], bool]
    questions: tuple[str, ...]
    steps: tuple[tuple[str, str, str], ...]


def _between(**bounds: tuple[int, int]) -> Callable[[Random], Numbers]:
    return lambda rng: {name: rng.randint(low, high) for name, (low, high) in bounds.items()}


def _multiple(**bounds: tuple[int, int]) -> Callable[[Random], Numbers]:
    """Draw like `_between`, with `a` turned into that multiple of `b`, so that a / b is exact."""
    between = _between(**bounds)

    def draw(rng: Random) -> Numbers:
        numbers = between(rng)
        return numbers | {"a": numbers["a"] * numbers["b"]}

    return draw


def _sum_divides(rng: Random) -> Numbers:
    c, share = rng.randint(2, 9), rng.randint(12, 90)
    a = rng.randint(5, c * share - 5)
    return {"a": a, "b": c * share - a, "c": c}


def _boxes_shared(rng: Random) -> Numbers:
    while True:
        a, b, d, share = rng.randint(3, 9), rng.randint(20, 60), rng.randint(2, 6), rng.randint(10, 80)
        if (c := a * b - d * share) >= 3:
            return {"a": a, "b": b, "c": c, "d": d}


def _positive(numbers: Numbers) -> bool:
    return min(numbers.values()) >= 2


ONE_STEP = (
    Template(
        "gain",
        _between(a=(11, 480), b=(11, 480)),
        _positive,
        (
            "{n} has {a} {o}. {m} gives {n} {b} more. How many {o} does {n} have now?",
            "{m} hands {b} {o} to {n}, who already had {a}. How many {o} does {n} own in the end?",
            "After collecting {a} {o}, {n} gets another {b} from {m}. What is the number of {o} that {n} has?",
        ),
        (("{n} has {=} {o}.", "a+b", "x"),),
    ),
    Template(
        "loss",
        _between(a=(200, 990), b=(11, 199)),
        lambda v: 2 <= v["b"] < v["a"] - 1,
        (
            "{n} has {a} {o} and loses {b} of them. How many {o} are left?",
            "Of the {a} {o} that {n} had, {b} were given to {m}. How many {o} does {n} keep?",
            "{m} takes {b} of the {a} {o} that belong to {n}. How many {o} remain with {n}?",
        ),
        (("{n} keeps {=} {o}.", "a-b", "x"),),
    ),
    Template(
        "groups",
        _between(a=(3, 9), b=(12, 99)),
        _positive,
        (
            "{n} buys {a} crates with {b} {o} in each. How many {o} does {n} buy?",
            "Each crate holds {b} {o}, and {n} buys {a} crates. How many {o} is that for {n}?",
            "There are {b} {o} in a crate. How many {o} are in the {a} crates that {n} carries?",
        ),
        (("{n} gets {=} {o}.", "a*b", "x"),),
    ),
    Template(
        "share",
        _multiple(a=(11, 99), b=(2, 9)),
        lambda v: v["b"] >= 2 and v["a"] > v["b"] and v["a"] % v["b"] == 0,
        (
            "{n} shares {a} {o} equally among {b} friends. How many {o} does each friend get?",
            "{b} friends split the {a} {o} of {n} evenly. How many {o} go to each of them?",
            "If {n} deals out {a} {o} to {b} friends in equal parts, how many {o} is one part?",
        ),
        (("{n} gives each {=} {o}.", "a/b", "x"),),
    ),
    Template(
        "difference",
        _between(a=(200, 990), b=(11, 199)),
        lambda v: 2 <= v["b"] < v["a"] - 1,
        (
            "{n} owns {a} {o} and {m} owns {b}. How many more {o} does {n} own than {m}?",
            "{m} counts {b} {o} while {n} counts {a}. By how many {o} is {n} ahead of {m}?",
        ),
        (("{n} leads {m} by {=} {o}.", "a-b", "x"),),
    ),
    Template(
        "rate",
        _between(a=(12, 99), b=(3, 9)),
        _positive,
        (
            "{n} makes {a} {o} an hour. How many {o} does {n} make in {b} hours?",
            "In one hour {n} finishes {a} {o}. How many {o} are finished after {b} hours?",
            "Working {b} hours at {a} {o} per hour, how many {o} does {n} produce?",
        ),
        (("{n} makes {=} {o}.", "a*b", "x"),),
    ),
    Template(
        "gain_distractor",
        _between(a=(11, 480), b=(11, 480), d=(11, 480)),
        _positive,
        (
            "{n} has {a} {o} and {d} {p}. Then {n} finds {b} more {o}. How many {o} does {n} have?",
            "On a shelf {n} keeps {d} {p} beside {a} {o}. {m} adds {b} {o}. How many {o} does {n} have?",
        ),
        (("{n} has {=} {o}.", "a+b", "x"),),
    ),
)

TWO_STEPS = (
    Template(
        "groups_plus",
        _between(a=(3, 9), b=(12, 79), c=(11, 250)),
        _positive,
        (
            "{n} buys {a} crates with {b} {o} each and finds {c} more. How many {o} does {n} have?",
            "{n} had {c} {o} before buying {a} crates of {b} {o}. How many {o} does {n} have now?",
        ),
        (("The crates hold {=} {o}.", "a*b", "x"), ("{n} has {=} {o}.", "x+c", "y")),
    ),
    Template(
        "more_total",
        _between(a=(11, 240), b=(11, 240)),
        _positive,
        (
            "{n} has {a} {o}. {m} has {b} more {o} than {n}. How many {o} do they have together?",
            "{m} owns {b} {o} more than {n}, who owns {a}. How many {o} do the two own in all?",
        ),
        (("{m} has {=} {o}.", "a+b", "x"), ("{n} and {m} have {=} {o}.", "a+x", "y")),
    ),
    Template(
        "price_cost",
        _between(a=(12, 79), b=(3, 9), c=(11, 190)),
        lambda v: _positive(v) and v["a"] * v["b"] > v["c"] + 1,
        (
            "{n} sells {a} {o} for ${b} each after paying ${c} for them. How much does {n} earn?",
            "The {o} cost {n} ${c}. {n} sells all {a} of them at ${b} apiece. What is the profit of {n}?",
        ),
        (("The {o} bring ${=}.", "a*b", "x"), ("{n} earns ${=}.", "x-c", "y")),
    ),
    Template(
        "gain_share",
        _sum_divides,
        lambda v: _positive(v) and (v["a"] + v["b"]) % v["c"] == 0,
        (
            "{n} has {a} {o}, gets {b} more and splits all among {c} boxes. How many {o} are in a box?",
            "{n} adds {b} {o} to {a} {o} and packs them evenly into {c} boxes. How many {o} per box?",
        ),
        (("{n} has {=} {o}.", "a+b", "x"), ("A box holds {=} {o}.", "x/c", "y")),
    ),
    Template(
        "rates",
        _between(a=(12, 60), b=(12, 60), c=(3, 8)),
        _positive,
        (
            "{n} makes {a} {o} an hour and {m} makes {b}. How many {o} do they make in {c} hours?",
            "Every hour {m} folds {b} {o} and {n} folds {a}. How many {o} are there after {c} hours?",
        ),
        (("{n} and {m} make {=} {o} an hour.", "a+b", "x"), ("They make {=} {o}.", "x*c", "y")),
    ),
    Template(
        "loss_twice",
        _between(a=(350, 990), b=(11, 170), c=(11, 170)),
        lambda v: _positive(v) and v["a"] > v["b"] + v["c"] + 1,
        (
            "{n} has {a} {o}, sells {b} and gives {c} to {m}. How many {o} does {n} have left?",
            "From {a} {o} {n} loses {b} on Monday and {c} on Tuesday. How many {o} does {n} still have?",
        ),
        (("First {n} keeps {=} {o}.", "a-b", "x"), ("Then {n} keeps {=} {o}.", "x-c", "y")),
    ),
    Template(
        "groups_distractor",
        _between(a=(3, 9), b=(12, 99), c=(11, 35), d=(11, 99)),
        lambda v: _positive(v) and v["a"] * v["b"] > v["c"] + 1,
        (
            "{n} has {d} {p} and {a} crates of {b} {o}. {c} {o} break. How many {o} are whole?",
            "{a} crates of {b} {o} reach {n} with {d} {p}. If {c} {o} are broken, how many {o} are whole?",
        ),
        (("{n} got {=} {o}.", "a*b", "x"), ("{n} has {=} whole {o}.", "x-c", "y")),
    ),
)

THREE_STEPS = (
    Template(
        "two_kinds",
        _between(a=(3, 9), b=(12, 60), c=(3, 9), d=(12, 60)),
        _positive,
        (
            "{n} fills {a} jars with {b} {o} each and {m} fills {c} jars with {d} {o} each. How many {o} in all?",
            "{a} jars of {b} {o} are from {n}, {c} jars of {d} {o} from {m}. How many {o} is that together?",
        ),
        (("{n} has {=} {o}.", "a*b", "x"), ("{m} has {=} {o}.", "c*d", "y"), ("Together {=} {o}.", "x+y", "z")),
    ),
    Template(
        "boxes_shared",
        _boxes_shared,
        lambda v: _positive(v) and v["a"] * v["b"] > v["c"] and (v["a"] * v["b"] - v["c"]) % v["d"] == 0,
        (
            "{n} opens {a} boxes of {b} {o}, keeps {c} and shares the rest among {d} pupils. How many {o} for each?",
            "Out of {a} boxes of {b} {o}, {n} sets {c} aside; {d} pupils share the others. How many {o} each?",
        ),
        (("{n} has {=} {o}.", "a*b", "x"), ("{n} shares {=} {o}.", "x-c", "y"), ("Each gets {=} {o}.", "y/d", "z")),
    ),
    Template(
        "profit",
        _between(a=(12, 79), b=(5, 9), c=(2, 4)),
        lambda v: _positive(v) and v["b"] > v["c"],
        (
            "{n} buys {a} {o} at ${c} each and sells them at ${b} each. How much does {n} gain?",
            "Each of {a} {o} costs {n} ${c} and sells for ${b}. What does {n} gain on all the {o}?",
        ),
        (("The {o} bring ${=}.", "a*b", "x"), ("They cost ${=}.", "a*c", "y"), ("{n} gains ${=}.", "x-y", "z")),
    ),
    Template(
        "three_people",
        _between(a=(20, 190), b=(11, 90), c=(11, 90)),
        _positive,
        (
            "{n} has {a} {o}. {m} has {b} more than {n}, {k} {c} more than {m}. How many {o} do {m} and {k} have?",
            "{m} has {b} {o} more than {n} with {a}, and {k} has {c} more than {m}. How many {o} are with {m} and {k}?",
        ),
        (("{m} has {=} {o}.", "a+b", "x"), ("{k} has {=} {o}.", "x+c", "y"), ("Both have {=} {o}.", "x+y", "z")),
    ),
    Template(
        "week",
        _between(a=(12, 99), b=(4, 9), c=(11, 40), d=(11, 300)),
        lambda v: _positive(v) and v["a"] * v["b"] > v["c"] + 1,
        (
            "{n} makes {a} {o} a day for {b} days, sells {c} and gets {d} from {m}. How many {o} has {n}?",
            "For {b} days {n} makes {a} {o} daily. {n} sells {c}, then {m} brings {d}. How many {o} has {n} now?",
        ),
        (("{n} makes {=} {o}.", "a*b", "x"), ("{n} keeps {=} {o}.", "x-c", "y"), ("{n} has {=} {o}.", "y+d", "z")),
    ),
)

STEP_SHARES = ((ONE_STEP, 0.4), (TWO_STEPS, 0.4), (THREE_STEPS, 0.2))
