"""Word problems in GSM8K's form: the sample type, its entities, and the generator."""

import re
from dataclasses import dataclass, field
from random import Random
from zlib import crc32

from datamodules.answers import GSM8K, final_answer, reference_answer
from datamodules.numerals import numbers_in
from datamodules.problem_parts import CATEGORY_OF, NAMES, OBJECTS, Numbers, Template
from datamodules.problem_templates import STEP_SHARES

_LETTERS = re.compile(r"[^\W\d_]+")
_WORD = re.compile(r"[^\W\d_]+|\d+")  # of generated texts, whose numbers are whole: faster than the parser of numbers


def words_and_numbers(text: str) -> set[str]:
    """Return the words of a text, and its numbers in their plain form (see `numerals`)."""
    return {*_LETTERS.findall(text), *numbers_in(text)}


def objects_in(text: str) -> list[str]:
    """Return the objects of generated problems that a text names, as whole words, in the order of their first use."""
    return [word for word in dict.fromkeys(_LETTERS.findall(text)) if word in CATEGORY_OF]


@dataclass
class Problem:
    """One question with its worked answer.

    Attributes:
        question: The question.
        answer: The worked answer, the reference, which ends in `#### result`.
        entities: Kind (name, object, number, key) -> words of the answer that can only be known from the question.
        template: Name of the template; `gsm8k` for problems that were not generated.
        pair: A number that identifies a pair of twins; None for a problem without a twin.
        answer_format: Where an output has its final answer (see `answers.final_answer`).
    """

    question: str
    answer: str
    entities: dict[str, tuple[str, ...]] = field(default_factory=dict)
    template: str = "gsm8k"
    pair: int | None = None
    answer_format: str = GSM8K

    def is_correct(self, output: str) -> bool:
        """Return whether the final answer of `output` is this problem's: the same number, or the same word."""
        answer = final_answer(output, self.answer_format)
        return answer is not None and answer == reference_answer(self.answer, self.answer_format)

    def entity_hits(self, output: str) -> dict[str, list[bool]]:
        """Return, for each kind of entity, whether each entity occurs in `output`.

        Names and objects occur as whole words, numbers by their value: 1000 is a hit for 1,000.
        """
        found = words_and_numbers(output)
        return {kind: [_occurs(entity, found) for entity in entities] for kind, entities in self.entities.items()}

    @property
    def category(self) -> str | None:
        """The category of the answer's object, such as `food`; None if the answer has no object with a category."""
        categories = [CATEGORY_OF[word] for word in self.entities.get("object", ()) if word in CATEGORY_OF]
        return categories[0] if categories else None

    def wrong_object(self, output: str) -> str | None:
        """Return the object that `output` has in the place of the right one.

        It is the first object that the question does not name. None if `output` names the right object, or no other
        object, or if the answer has no object with a category.
        """
        named, known = objects_in(output), objects_in(self.question)
        if self.category is None or any(word in named for word in self.entities["object"]):
            return None
        return next((word for word in named if word not in known), None)


def _occurs(entity: str, found: set[str]) -> bool:
    return entity in found or (bool(parts := words_and_numbers(entity)) and parts <= found)


def _held_out(*key: object) -> bool:
    return crc32("|".join(map(str, key)).encode()) % 10 == 0


def split_of(question: str) -> str:
    """Return the split of a generated question, by its hash: 2 % validation, 2 % test, the rest train."""
    return {0: "validation", 1: "test"}.get(crc32(question.encode()) % 50, "train")


Drawn = tuple[Template, Numbers, dict[str, str], int]  # template, numbers, words, index of the paraphrase


def _question(template: Template, numbers: Numbers, words: dict[str, str], paraphrase: int) -> str:
    return template.questions[paraphrase].format(**words, **numbers)


def _fill(
    template: Template, numbers: Numbers, words: dict[str, str], paraphrase: int, pair: int | None = None
) -> Problem:
    values, lines = template.work(numbers), list[str]()
    assert values is not None  # callers have drawn numbers that make a sensible problem
    for sentence, expression, result in template.steps:
        left, sign, right = tuple(expression)
        worked = f"<<{values[left]}{sign}{values[right]}={values[result]}>>{values[result]}"
        lines.append(sentence.replace("{=}", worked).format(**words))
    answer = "\n".join([*lines, f"#### {values[result]}"])
    question = _question(template, numbers, words, paraphrase)
    in_question, in_answer = set(_WORD.findall(question)), set(_WORD.findall(answer))
    names = dict.fromkeys(words[field] for field in "nmk")
    entities = {
        "name": tuple(name for name in names if name in in_question and name in in_answer),
        "object": (words["o"],) if words["o"] in in_answer else (),
        "number": tuple(dict.fromkeys(n for n in map(str, numbers.values()) if n in in_answer)),
    }
    return Problem(question, answer, entities, template.name, pair)


def _draw(rng: Random, held_out: bool) -> Drawn:
    templates = rng.choices([t for t, _ in STEP_SHARES], [share for _, share in STEP_SHARES])[0]
    template = rng.choice(templates)
    paraphrase = rng.randrange(len(template.questions))
    while True:
        numbers = template.draw(rng)
        if template.work(numbers) and _held_out(numbers["a"], numbers["b"]) is held_out:
            break
    while True:
        n, m, k = rng.sample(NAMES, 3)
        o, p = rng.sample(OBJECTS, 2)
        if _held_out(n, o) is held_out:
            return template, numbers, {"n": n, "m": m, "k": k, "o": o, "p": p}, paraphrase


def generate(seed: int, split: str, index: int, held_out: bool = False) -> Problem:
    """Return problem `index` of a split; the result depends on the arguments only.

    Args:
        seed: Seed of the stream of problems.
        split: `train`, `validation` or `test`. The hash of a question determines its split, so splits never overlap.
        index: Position in the stream.
        held_out: Use the tenth of the pairs of first name and first object, and of pairs of the first two numbers, that
            no training problem has in these places. A second name or object may stand beside any other.
    """
    rng = Random(f"{seed}/{split}/{index}/{held_out}")
    while True:
        drawn = _draw(rng, held_out)
        if split_of(_question(*drawn)) == split:
            return _fill(*drawn)


def generate_twins(seed: int, split: str, index: int) -> tuple[Problem, Problem]:
    """Return two problems that differ in exactly one number; the first belongs to `split`."""
    rng = Random(f"{seed}/{split}/{index}/twin")
    while True:
        template, numbers, words, paraphrase = _draw(rng, False)
        which, by = rng.choice(list(numbers)), rng.choice([-9, -6, -4, -3, -2, -1, 1, 2, 3, 4, 6, 9])
        changed = numbers | {which: numbers[which] + by}
        if split_of(_question(template, numbers, words, paraphrase)) == split and template.work(changed):
            first, second = (_fill(template, values, words, paraphrase, index) for values in (numbers, changed))
            if second.answer != first.answer:
                return first, second


def generate_passkey(seed: int, split: str, index: int) -> Problem:
    """Return a problem whose answer is copied from the question: five digits, or a word that does not exist.

    Splits are independent streams here, not disjoint sets: about one in a hundred test keys occurs in training with the
    same name.
    """
    rng = Random(f"{seed}/{split}/{index}/passkey")
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        key, what = str(rng.randrange(10_000, 100_000)), "number"
    else:
        key, what = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)), "word"
    question = f"The secret {what} of {name} is {key}. What is the secret {what} of {name}?"
    answer = f"The {what} of {name} is {key}.\n#### {key}"
    return Problem(question, answer, {"name": (name,), "key": (key,)}, f"passkey_{what}")


def read_entities(question: str, answer: str) -> dict[str, tuple[str, ...]]:
    """Find the names and numbers of a free-text answer that can only be known from the question.

    Numbers are those that occur in both. Names are capitalised words that the question uses within a sentence or with
    a possessive, not only at the start of a sentence.
    """
    numbers = set(numbers_in(question))
    names = set(re.findall(r"(?<![.?!] )(?<!^)\b[A-Z][a-z]{2,}\b|\b[A-Z][a-z]{2,}(?=[’']s\b)", question))
    return {
        "name": tuple(word for word in dict.fromkeys(_LETTERS.findall(answer)) if word in names),
        "number": tuple(number for number in dict.fromkeys(numbers_in(answer)) if number in numbers),
    }
