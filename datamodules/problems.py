"""Word problems of GSM8K's shape: the sample type, how an answer is scored, and the generator."""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from random import Random
from zlib import crc32

from datamodules.problem_parts import NAMES, OBJECTS, Numbers, Template
from datamodules.problem_templates import STEP_SHARES

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)")
_NO_MARKS = str.maketrans("", "", ",$%")
_WORD = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?")


def final_answer(text: str) -> str | None:
    """Return what stands after the last `####`, as GSM8K writes it: commas, `$`, `%` and a final stop stripped.

    Numbers come back in one spelling (`18.0` and `18` are the same answer), however large. None where there is none.
    """
    _, mark, tail = text.rpartition("####")
    words = tail.translate(_NO_MARKS).split() if mark else []
    word = words[0].rstrip(".") if words else ""
    if not _NUMBER.fullmatch(word):
        return word or None
    number = f"{Decimal(word):f}"
    return number.rstrip("0").rstrip(".") if "." in number else number


@dataclass
class Problem:
    """One question with its worked answer.

    Attributes:
        question: The question.
        answer: The worked answer, ending in `#### result`.
        entities: Type -> words of the answer that only the question can tell (name, object, number).
        template: What shape it has; the source's name for problems that were not generated.
        pair: A number that twins share, to tell which two belong together; None where there is no twin.
    """

    question: str
    answer: str
    entities: dict[str, tuple[str, ...]] = field(default_factory=dict)
    template: str = "gsm8k"
    pair: int | None = None

    def is_correct(self, output: str) -> bool:
        """Whether the output's final answer is this problem's."""
        given = final_answer(output)
        return given is not None and given == final_answer(self.answer)

    def entity_hits(self, output: str) -> dict[str, list[bool]]:
        """Type -> whether each of its entities stands in the output as a whole word."""
        words = set(_WORD.findall(output))
        return {kind: [entity in words for entity in entities] for kind, entities in self.entities.items()}


def _held_out(*key: object) -> bool:
    return crc32("|".join(map(str, key)).encode()) % 10 == 0


def split_of(question: str) -> str:
    """Return the split a generated question belongs to, by hash: 2 % validation, 2 % test, the rest train."""
    return {0: "validation", 1: "test"}.get(crc32(question.encode()) % 50, "train")


Drawn = tuple[Template, Numbers, dict[str, str], int]  # the template, what fills it, and which paraphrase


def _question(template: Template, numbers: Numbers, words: dict[str, str], paraphrase: int) -> str:
    return template.questions[paraphrase].format(**words, **numbers)


def _fill(
    template: Template, numbers: Numbers, words: dict[str, str], paraphrase: int, pair: int | None = None
) -> Problem:
    values, lines = template.work(numbers), []
    for sentence, (left, sign, right), result in template.steps:
        worked = f"<<{values[left]}{sign}{values[right]}={values[result]}>>{values[result]}"
        lines.append(sentence.replace("{=}", worked).format(**words))
    answer = "\n".join([*lines, f"#### {values[result]}"])
    question = _question(template, numbers, words, paraphrase)
    asked, told = set(_WORD.findall(question)), set(_WORD.findall(answer))
    entities = {
        "name": tuple(w for w in dict.fromkeys(words[f] for f in "nmk") if w in asked and w in told),
        "object": (words["o"],) if words["o"] in told else (),
        "number": tuple(dict.fromkeys(n for n in map(str, numbers.values()) if n in told)),
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
    """Return problem `index` of a split, always the same one for the same arguments.

    Args:
        seed: Which stream.
        split: `train`, `validation` or `test`; the question's own hash decides, so that splits never overlap.
        index: Position in the stream.
        held_out: Draw from the tenth of (name, object) and number pairs that all other problems avoid.
    """
    rng = Random(f"{seed}/{split}/{index}/{held_out}")
    while True:
        drawn = _draw(rng, held_out)
        if split_of(_question(*drawn)) == split:
            return _fill(*drawn)


def generate_twins(seed: int, split: str, index: int) -> tuple[Problem, Problem]:
    """Return two problems that differ in one number only; the first belongs to `split`."""
    rng = Random(f"{seed}/{split}/{index}/twin")
    while True:
        template, numbers, words, paraphrase = _draw(rng, False)
        which, by = rng.choice(list(numbers)), rng.choice([-9, -6, -4, -3, -2, -1, 1, 2, 3, 4, 6, 9])
        changed = numbers | {which: numbers[which] + by}
        if split_of(_question(template, numbers, words, paraphrase)) == split and template.work(changed):
            first, second = (_fill(template, given, words, paraphrase, index) for given in (numbers, changed))
            if second.answer != first.answer:
                return first, second


def generate_passkey(seed: int, split: str, index: int) -> Problem:
    """Return a problem whose answer is copied: five digits, or a nonce word that no vocabulary holds.

    Splits are streams of their own here, not disjoint sets: about one test key in a hundred meets its name in training.
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
    """Find the words of a free text that an answer can only have from its question.

    Numbers by their digits; names as capitalised words that never stand at the start of a sentence alone, that is,
    that the question also writes in mid-sentence or with a possessive.
    """
    asked, told = set(_WORD.findall(question)), _WORD.findall(answer)
    names = set(re.findall(r"(?<![.?!] )(?<!^)\b[A-Z][a-z]{2,}\b|\b[A-Z][a-z]{2,}(?=[’']s\b)", question))
    return {
        "name": tuple(w for w in dict.fromkeys(told) if w in names),
        "number": tuple(w for w in dict.fromkeys(told) if w in asked and w[0].isdigit()),
    }
