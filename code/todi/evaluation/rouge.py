"""ROUGE-L and exact match of responses against references, as the published evaluation computes them."""

import string
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L F1 with Porter stemming of each response against the best of its references, 0 to 100.

    Raises:
        ValueError: the two differ in length, or a response has no reference.
    """
    _check(responses, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [100 * scorer.score_multi(list(texts), response)["rougeL"].fmeasure
            for response, texts in zip(responses, references, strict=True)]


def exact_match(responses: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each response is one of its references, apart from case, punctuation and spacing.

    Raises:
        ValueError: the two differ in length, or a response has no reference.
    """
    _check(responses, references)
    return [_plain(response) in {_plain(text) for text in texts}
            for response, texts in zip(responses, references, strict=True)]


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _check(responses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(responses) != len(references):
        raise ValueError(f"{len(responses)} responses for {len(references)} lists of references")
    missing = next((index for index, texts in enumerate(references) if not texts), None)
    if missing is not None:
        raise ValueError(f"response {missing} has no reference")
