"""The sentences of generated word problems: nineteen templates of one to three steps.

A template draws numbers and lists paraphrases of the question and the steps of the answer. A step is
`(sentence, expression, result)`: `{=}` in the sentence becomes the worked expression in GSM8K's form,
`<<12+30=42>>42`, and later steps can use the result by its name.

Fields: {n}, {m} and {k} are people, {o} and {p} objects, {a} to {d} numbers, and x, y, z the names of results.
"""

from datamodules.problem_parts import Template, between, boxes_shared, multiple, sum_divides

ONE_STEP = (
    Template(
        "gain",
        between(a=(11, 480), b=(11, 480)),
        (
            "{n} has {a} {o}. {m} gives {n} {b} more. How many {o} does {n} have now?",
            "{m} hands {b} {o} to {n}, who already had {a}. How many {o} does {n} own in the end?",
            "After collecting {a} {o}, {n} gets another {b} from {m}. What is the number of {o} that {n} has?",
        ),
        (("{n} has {=} {o}.", "a+b", "x"),),
    ),
    Template(
        "loss",
        between(a=(200, 990), b=(11, 199)),
        (
            "{n} has {a} {o} and loses {b} of them. How many {o} are left?",
            "Of the {a} {o} that {n} had, {b} were given to {m}. How many {o} does {n} keep?",
            "{m} takes {b} of the {a} {o} that belong to {n}. How many {o} remain with {n}?",
        ),
        (("{n} keeps {=} {o}.", "a-b", "x"),),
    ),
    Template(
        "groups",
        between(a=(3, 9), b=(12, 99)),
        (
            "{n} buys {a} crates with {b} {o} in each. How many {o} does {n} buy?",
            "Each crate holds {b} {o}, and {n} buys {a} crates. How many {o} is that for {n}?",
            "There are {b} {o} in a crate. How many {o} are in the {a} crates that {n} carries?",
        ),
        (("{n} gets {=} {o}.", "a*b", "x"),),
    ),
    Template(
        "share",
        multiple(a=(11, 99), b=(2, 9)),
        (
            "{n} shares {a} {o} equally among {b} friends. How many {o} does each friend get?",
            "{b} friends split the {a} {o} of {n} evenly. How many {o} go to each of them?",
            "If {n} deals out {a} {o} to {b} friends in equal parts, how many {o} is one part?",
        ),
        (("{n} gives each {=} {o}.", "a/b", "x"),),
    ),
    Template(
        "difference",
        between(a=(200, 990), b=(11, 199)),
        (
            "{n} owns {a} {o} and {m} owns {b}. How many more {o} does {n} own than {m}?",
            "{m} counts {b} {o} while {n} counts {a}. By how many {o} is {n} ahead of {m}?",
        ),
        (("{n} leads {m} by {=} {o}.", "a-b", "x"),),
    ),
    Template(
        "rate",
        between(a=(12, 99), b=(3, 9)),
        (
            "{n} makes {a} {o} an hour. How many {o} does {n} make in {b} hours?",
            "In one hour {n} finishes {a} {o}. How many {o} are finished after {b} hours?",
            "Working {b} hours at {a} {o} per hour, how many {o} does {n} produce?",
        ),
        (("{n} makes {=} {o}.", "a*b", "x"),),
    ),
    Template(
        "gain_distractor",
        between(a=(11, 480), b=(11, 480), d=(11, 480)),
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
        between(a=(3, 9), b=(12, 79), c=(11, 250)),
        (
            "{n} buys {a} crates with {b} {o} each and finds {c} more. How many {o} does {n} have?",
            "{n} had {c} {o} before buying {a} crates of {b} {o}. How many {o} does {n} have now?",
        ),
        (("The crates hold {=} {o}.", "a*b", "x"), ("{n} has {=} {o}.", "x+c", "y")),
    ),
    Template(
        "more_total",
        between(a=(11, 240), b=(11, 240)),
        (
            "{n} has {a} {o}. {m} has {b} more {o} than {n}. How many {o} do they have together?",
            "{m} owns {b} {o} more than {n}, who owns {a}. How many {o} do the two own in all?",
        ),
        (("{m} has {=} {o}.", "a+b", "x"), ("{n} and {m} have {=} {o}.", "a+x", "y")),
    ),
    Template(
        "price_cost",
        between(a=(12, 79), b=(3, 9), c=(11, 190)),
        (
            "{n} sells {a} {o} for ${b} each after paying ${c} for them. How much does {n} earn?",
            "The {o} cost {n} ${c}. {n} sells all {a} of them at ${b} apiece. What is the profit of {n}?",
        ),
        (("The {o} bring ${=}.", "a*b", "x"), ("{n} earns ${=}.", "x-c", "y")),
    ),
    Template(
        "gain_share",
        sum_divides,
        (
            "{n} has {a} {o}, gets {b} more and splits all among {c} boxes. How many {o} are in a box?",
            "{n} adds {b} {o} to {a} {o} and packs them evenly into {c} boxes. How many {o} per box?",
        ),
        (("{n} has {=} {o}.", "a+b", "x"), ("A box holds {=} {o}.", "x/c", "y")),
    ),
    Template(
        "rates",
        between(a=(12, 60), b=(12, 60), c=(3, 8)),
        (
            "{n} makes {a} {o} an hour and {m} makes {b}. How many {o} do they make in {c} hours?",
            "Every hour {m} folds {b} {o} and {n} folds {a}. How many {o} are there after {c} hours?",
        ),
        (("{n} and {m} make {=} {o} an hour.", "a+b", "x"), ("They make {=} {o}.", "x*c", "y")),
    ),
    Template(
        "loss_twice",
        between(a=(350, 990), b=(11, 170), c=(11, 170)),
        (
            "{n} has {a} {o}, sells {b} and gives {c} to {m}. How many {o} does {n} have left?",
            "From {a} {o} {n} loses {b} on Monday and {c} on Tuesday. How many {o} does {n} still have?",
        ),
        (("First {n} keeps {=} {o}.", "a-b", "x"), ("Then {n} keeps {=} {o}.", "x-c", "y")),
    ),
    Template(
        "groups_distractor",
        between(a=(3, 9), b=(12, 99), c=(11, 35), d=(11, 99)),
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
        between(a=(3, 9), b=(12, 60), c=(3, 9), d=(12, 60)),
        (
            "{n} fills {a} jars with {b} {o} each and {m} fills {c} jars with {d} {o} each. How many {o} in all?",
            "{a} jars of {b} {o} are from {n}, {c} jars of {d} {o} from {m}. How many {o} is that together?",
        ),
        (("{n} has {=} {o}.", "a*b", "x"), ("{m} has {=} {o}.", "c*d", "y"), ("Together {=} {o}.", "x+y", "z")),
    ),
    Template(
        "boxes_shared",
        boxes_shared,
        (
            "{n} opens {a} boxes of {b} {o}, keeps {c} and shares the rest among {d} pupils. How many {o} for each?",
            "Out of {a} boxes of {b} {o}, {n} sets {c} aside; {d} pupils share the others. How many {o} each?",
        ),
        (("{n} has {=} {o}.", "a*b", "x"), ("{n} shares {=} {o}.", "x-c", "y"), ("Each gets {=} {o}.", "y/d", "z")),
    ),
    Template(
        "profit",
        between(a=(12, 79), b=(5, 9), c=(2, 4)),
        (
            "{n} buys {a} {o} at ${c} each and sells them at ${b} each. How much does {n} gain?",
            "Each of {a} {o} costs {n} ${c} and sells for ${b}. What does {n} gain on all the {o}?",
        ),
        (("The {o} bring ${=}.", "a*b", "x"), ("They cost ${=}.", "a*c", "y"), ("{n} gains ${=}.", "x-y", "z")),
    ),
    Template(
        "three_people",
        between(a=(20, 190), b=(11, 90), c=(11, 90)),
        (
            "{n} has {a} {o}. {m} has {b} more than {n}, {k} {c} more than {m}. How many {o} do {m} and {k} have?",
            "{m} has {b} {o} more than {n} with {a}, and {k} has {c} more than {m}. How many {o} are with {m} and {k}?",
        ),
        (("{m} has {=} {o}.", "a+b", "x"), ("{k} has {=} {o}.", "x+c", "y"), ("Both have {=} {o}.", "x+y", "z")),
    ),
    Template(
        "week",
        between(a=(12, 99), b=(4, 9), c=(11, 40), d=(11, 300)),
        (
            "{n} makes {a} {o} a day for {b} days, sells {c} and gets {d} from {m}. How many {o} has {n}?",
            "For {b} days {n} makes {a} {o} daily. {n} sells {c}, then {m} brings {d}. How many {o} has {n} now?",
        ),
        (("{n} makes {=} {o}.", "a*b", "x"), ("{n} keeps {=} {o}.", "x-c", "y"), ("{n} has {=} {o}.", "y+d", "z")),
    ),
)

STEP_SHARES = ((ONE_STEP, 0.4), (TWO_STEPS, 0.4), (THREE_STEPS, 0.2))
