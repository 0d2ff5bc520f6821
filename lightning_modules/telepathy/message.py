"""The size of the message that reaches the target: soft tokens or codes, beside the text and the compressed text."""

import math
import zlib
from collections.abc import Sequence

import numpy as np

from lightning_modules.telepathy.results import Measures, ProblemResult

BF16 = 16  # bits of a number of a soft token


def deflated_bits(text: str) -> int:
    """Return the bits of a text compressed alone with gzip's method (DEFLATE, RFC 1951), without gzip's header."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return 8 * len(packer.compress(text.encode()) + packer.flush())


def add_message_sizes(results: Sequence[ProblemResult], width: int, codes: int, measures: Measures) -> None:
    """Add the bits of a question, as means over the questions.

    - `soft_bits`: of its soft tokens, 16 for each number; of codes log2(codes) each, without the codebook, which is
      sent once.
    - `code_bits`: with a bottleneck, log2(`code_perplexity`) for each code: what an entropy coder needs that knows how
      often each code occurs.
    - `text_bits`: of its text in UTF-8.
    - `gzip_bits`: of its text, compressed alone. `gzip_set_bits`: its share of the texts of all questions, compressed
      together one after the other, so that words of earlier questions cost little.

    Args:
        results: The results of all problems.
        width: Numbers of a soft token.
        codes: Number of codes of the bottleneck; 0 without one.
        measures: Take the sizes; `code_perplexity` is read from them.
    """
    count = len(results)
    soft_tokens = float(np.mean([result.soft_count for result in results]))
    texts = [result.problem.question for result in results]
    measures.add("soft_bits", soft_tokens * (math.log2(codes) if codes else BF16 * width), count)
    if codes:
        measures.add("code_bits", soft_tokens * math.log2(measures.values["code_perplexity"]), count)
    measures.add("text_bits", float(np.mean([8 * len(text.encode()) for text in texts])), count)
    measures.add("gzip_bits", float(np.mean([deflated_bits(text) for text in texts])), count)
    measures.add("gzip_set_bits", deflated_bits("\n".join(texts)) / count, count)
