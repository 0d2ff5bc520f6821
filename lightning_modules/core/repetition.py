"""Whether generated text repeats itself."""

from collections.abc import Sequence

from lightning_modules.core.diversity import distinct_n


def repetition_rate(texts: Sequence[str], n: int = 4) -> float:
    """Return the share of n-grams of words that have occurred in the same text before, the mean over texts.

    1 - different n-grams / n-grams of a text (rep-n of Welleck et al. 2019, arXiv:1908.04319). Texts without an n-gram
    do not count; NaN if none has one. It grows with the length of a text, so only texts of about the same length can be
    compared.
    """
    rates = [1 - distinct_n([text], n) for text in texts if len(text.split()) >= n]
    return sum(rates) / len(rates) if rates else float("nan")
