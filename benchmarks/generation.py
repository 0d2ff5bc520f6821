"""Seconds to answer a batch of word problems as text, by the kind of the cache and with or without rows that leave.

    python benchmarks/generation.py [--target assets/pair/target] [--rows 250 32 8] [--device cuda] [--dtype bfloat16]

The problems are generated. Of three runs the fastest counts, after one that is not timed, in which a static cache is
compiled on a GPU. `alone` is the time of the rows one by one, of 32 of them scaled up. The last column tells whether
the answers are those of the first line.
"""

import argparse
import time
from pathlib import Path

import torch

from datamodules.problems import generate
from lightning_modules.pretrained import decoding
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.loading_device import loading_to
from lightning_modules.telepathy.layout import Row
from lightning_modules.telepathy.target import Target

PROMPT = "Question: {question}\nAnswer:"
TARGET = Path(__file__).parents[1] / "assets" / "pair" / "target"
ALONE, REPEATS = 32, 3


def answer(target: Target, rows: list[Row], limit: int, repeats: int = REPEATS) -> tuple[float, list[str]]:
    """Return the least seconds to answer rows, and the answers."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        answers = target.answers(rows, limit)
        seconds.append(time.perf_counter() - began)
    return min(seconds), [answer.text for answer in answers]


def alone(target: Target, rows: list[Row], limit: int) -> tuple[float, list[str]]:
    """Return the seconds to answer rows one by one, estimated from the first ones, and their answers."""
    some = rows[:ALONE]
    made = [answer(target, [row], limit, repeats=1) for row in some]
    return sum(seconds for seconds, _ in made) * len(rows) / len(some), [text for _, (text,) in made]


def run() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(TARGET))
    parser.add_argument("--rows", type=int, nargs="+", default=[250, 32, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    with loading_to(torch.device(options.device)):
        target = Target(Pretrained(options.target, dtype=options.dtype), PROMPT)
    print("| rows | cache | rows that have ended | seconds | rows/s | same answers |\n|---|---|---|---|---|---|")
    for count in options.rows:
        problems = [generate(0, "test", index) for index in range(count)]
        rows = target.rows.text([problem.question for problem in problems], [problem.answer for problem in problems])
        limit = max(len(row.answer) for row in rows)
        share = decoding.SHARE
        expected: list[str] = []
        for cache, rule in (("growing", "alone"), ("growing", "stay"), ("growing", "leave"), ("static", "stay")):
            target.static_cache, decoding.SHARE = cache == "static", share if rule == "leave" else 2.0
            if rule != "alone":
                target.answers(rows, limit)
            seconds, texts = (alone if rule == "alone" else answer)(target, rows, limit)
            expected = expected or texts
            same = texts[: len(expected)] == expected
            print(f"| {count} | {cache} | {rule} | {seconds:.2f} | {count / seconds:.0f} | {'yes' if same else 'no'} |")
        decoding.SHARE = share


if __name__ == "__main__":
    run()
