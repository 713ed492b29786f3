"""WikiText pages as running text, named by the task file with ``!function``.

Restates lm-evaluation-harness 0.4.13's detokenizer and its count of words and bytes, so its output
is part of what the task is: this file's hash is in its key.
"""

from __future__ import annotations

import re
from typing import Any

# WikiText's tokenization marks and how they are undone, in this order. The first pattern looks
# like a slip (its slashes are literal) and never matches; it is part of the task as published.
_DETOKENIZE = [
    (r"s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
]


def wikitext_detokenized(doc: dict[str, Any]) -> str:
    """A page of WikiText as running text."""
    text = doc["page"]
    for pattern, replacement in _DETOKENIZE:
        text = re.sub(pattern, replacement, text)
    return text


def wikitext_results(doc: dict[str, Any], results: Any) -> dict[str, tuple[float, int]]:
    """The log-likelihood over the words and bytes of the page before detokenization."""
    (loglikelihood,) = results
    words = len(re.split(r"\s+", doc["page"]))
    size = len(doc["page"].encode())
    return {
        "word_perplexity": (loglikelihood, words),
        "byte_perplexity": (loglikelihood, size),
        "bits_per_byte": (loglikelihood, size),
    }
