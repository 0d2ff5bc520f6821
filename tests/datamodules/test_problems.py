"""The generator of word problems: arithmetic, proportions, splits, entities, and the comparison of answers."""

import hashlib
import re
from collections import Counter
from fractions import Fraction

import pytest

from datamodules.answers import final_answer
from datamodules.problem_parts import CATEGORIES, NAMES, OBJECTS
from datamodules.problem_templates import STEP_SHARES
from datamodules.problems import (
    Problem,
    generate,
    generate_passkey,
    generate_twins,
    read_entities,
    split_of,
)

STEP = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
WORDS = re.compile(r"\w+")
STEPS = {template.name: len(template.steps) for templates, _ in STEP_SHARES for template in templates}


@pytest.fixture(scope="module")
def train() -> list[Problem]:
    return [generate(0, "train", i) for i in range(20_000)]


@pytest.fixture(scope="module")
def heldout() -> list[Problem]:
    return [generate(0, "test", i, held_out=True) for i in range(500)]


def digest(problems: list[Problem]) -> str:
    return hashlib.sha256("\0".join(f"{p.question}\1{p.answer}" for p in problems).encode()).hexdigest()[:16]


def pairs(problem: Problem) -> tuple[tuple[str, str], tuple[str, ...]]:
    """Recovers the (name, object) pair and the (a, b) number pair from the question, by its template."""
    template = next(t for templates, _ in STEP_SHARES for t in templates if t.name == problem.template)
    for question in template.questions:
        pattern = re.sub(r"\\{([a-z])\\}", r"{\1}", re.escape(question))
        seen: set[str] = set()

        def group(match: re.Match, seen: set[str] = seen) -> str:
            field = match[1]
            if field in seen:
                return f"(?P={field})"
            seen.add(field)
            return f"(?P<{field}>\\d+)" if field in "abcd" else f"(?P<{field}>\\w+)"

        if found := re.fullmatch(re.sub(r"\{([a-z])\}", group, pattern), problem.question):
            return (found["n"], found["o"]), (found["a"], found["b"])
    raise AssertionError(problem.question)


def test_text_is_what_the_embedded_pair_was_trained_on():
    """The embedded models were trained on these texts; a change here invalidates their results."""
    assert digest([generate(0, "train", i) for i in range(200)]) == "fbb673c6a43773b0"
    assert digest([generate(0, "test", i) for i in range(200)]) == "bef03b5eb1cffce7"
    assert digest([generate(0, "test", i, held_out=True) for i in range(200)]) == "592d22f48eb99ada"
    assert digest([twin for i in range(100) for twin in generate_twins(0, "test", i)]) == "8630e062a9fd9577"
    assert digest([generate_passkey(0, "test", i) for i in range(200)]) == "71d10ebab6a8f349"


def test_vocabulary_is_wide():
    for words in (NAMES, OBJECTS):
        assert len(set(words)) == len(words) >= 100
    assert len(STEPS) == 19


def test_each_object_has_one_category():
    words = [word for of_category in CATEGORIES.values() for word in of_category.split()]
    assert sorted(words) == list(OBJECTS)
    assert all(len(of_category.split()) > 5 for of_category in CATEGORIES.values())


def test_no_final_answer_dominates(train):
    answer, count = Counter(final_answer(p.answer) for p in train).most_common(1)[0]
    assert count / len(train) <= 0.03, answer


def test_proportions_of_the_numbers_of_steps(train):
    counts = Counter(len(STEP.findall(p.answer)) for p in train)
    for steps, share in {1: 0.4, 2: 0.4, 3: 0.2}.items():
        assert counts[steps] / len(train) == pytest.approx(share, abs=0.015)
    templates = Counter(p.template for p in train)
    assert set(templates) == set(STEPS)
    assert all(len(STEP.findall(p.answer)) == STEPS[p.template] for p in train)


def test_every_step_is_right_and_the_last_is_the_answer(train, heldout):
    twins = [twin for i in range(300) for twin in generate_twins(0, "test", i)]
    for problem in [*train, *heldout, *twins]:
        known = set(re.findall(r"\d+", problem.question))
        for left, sign, right, result, written in STEP.findall(problem.answer):
            exact = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": Fraction}[sign](int(left), int(right))
            assert exact == int(result) == int(written)
            assert {left, right} <= known, "a step may use the question's numbers and earlier results only"
            known.add(result)
        assert problem.answer.endswith(f"\n#### {result}")
        assert problem.is_correct(problem.answer)


def test_held_out_pairs_are_never_in_training_and_always_in_heldout(train, heldout):
    trained, held = [pairs(p) for p in train], [pairs(p) for p in heldout]
    for kind in (0, 1):
        assert not {pair[kind] for pair in trained} & {pair[kind] for pair in held}
    # About a tenth of all (name, object) pairs: training uses the others only
    assert len({pair[0] for pair in trained}) / (len(NAMES) * len(OBJECTS)) < 0.905


def test_splits_are_disjoint(train, heldout):
    sets = {"train": train} | {
        name: [generate(seed, name, i) for seed in (0, 1) for i in range(100)] for name in ("validation", "test")
    }
    for name, problems in sets.items():
        assert {split_of(p.question) for p in problems} == {name}
    assert {split_of(p.question) for p in heldout} == {"test"}
    assert generate(0, "train", 7) != generate(1, "train", 7)


def test_twins_differ_in_exactly_one_number():
    for index in range(300):
        first, second = generate_twins(0, "test", index)
        words, others = WORDS.findall(first.question), WORDS.findall(second.question)
        changed = {(w, o) for w, o in zip(words, others, strict=True) if w != o}
        assert len(changed) == 1
        assert all(text.isdigit() for text in changed.pop())
        assert first.pair == second.pair == index
        assert first.answer != second.answer
        assert split_of(first.question) == "test"


def test_passkeys_are_copied_from_the_question():
    problems = [generate_passkey(0, "test", i) for i in range(500)]
    assert {p.template for p in problems} == {"passkey_number", "passkey_word"}
    for problem in problems:
        (key,) = problem.entities["key"]
        assert final_answer(problem.answer) == key
        assert key in WORDS.findall(problem.question)
        assert key.isdigit() == (problem.template == "passkey_number")
        assert problem.entity_hits(problem.answer) == {"name": [True], "key": [True]}
    assert len({p.entities["key"] for p in problems}) > 490


def test_entities_are_whole_words_of_question_and_answer(train, heldout):
    for problem in [*train[:3000], *heldout]:
        question, answer = set(WORDS.findall(problem.question)), set(WORDS.findall(problem.answer))
        found = [entity for entities in problem.entities.values() for entity in entities]
        assert found
        assert set(found) <= question & answer
    assert sum(bool(p.entities["object"]) for p in train) / len(train) > 0.9


def test_entity_hits_need_whole_words():
    problem = Problem("", "#### 1", {"name": ("Ann",), "object": ("cups",), "number": ("12",)})
    assert problem.entity_hits("Anna has 120 teacups.") == {"name": [False], "object": [False], "number": [False]}
    assert problem.entity_hits("Ann: <<12+1=13>> cups") == {"name": [True], "object": [True], "number": [True]}


def test_a_wrong_object_stands_in_the_place_of_the_right_one():
    problem = Problem("Ann has 12 cups, 3 beads", "#### 1", {"object": ("cups",)})
    assert problem.category == "tableware"
    assert problem.wrong_object("Ann has 12 teacups, beads, hats and pears.") == "hats"
    assert problem.wrong_object("Ann has hats and cups.") is problem.wrong_object("beads") is None
    assert Problem("", "#### 1").wrong_object("hats") is Problem("", "#### 1").category is None
    assert Problem("", "#### 1", {"object": ("teacups",)}).wrong_object("hats") is None


def test_entities_are_compared_by_value():
    problem = Problem("", "#### 1", {"number": ("1,000", "2.5", "-3"), "name": ("Ann",)})
    written = "Ann’s profit is $1000.00 of 2½... no, 2.50 at －3 degrees."
    assert problem.entity_hits(written) == {"number": [True, True, True], "name": [True]}
    assert problem.entity_hits("1, 000, 25 and 3: Annie") == {"number": [False, False, False], "name": [False]}


def test_entities_of_free_text():
    question = "On Friday, Natalia sold 48 clips. How many did Natalia's friend Weng sell if he sold 12 more?"
    answer = "Weng sold 48+12=<<48+12=60>>60 clips, Natalia 48.\n#### 60"
    assert read_entities(question, answer) == {"name": ("Weng", "Natalia"), "number": ("48", "12")}


def test_numbers_of_free_text_are_not_torn():
    question = "A house costs $80,000 and a car 20\u00a0000. With 5% interest (or .5), is it 1,2 or 3?"
    answer = "80,000+20,000=<<80000+20000=100000>>100,000, and 80000*0.50=<<80000*0.50=40000>>40,000\n#### 100,000"
    assert read_entities(question, answer)["number"] == ("80000", "20000", "0.5")
