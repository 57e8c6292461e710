"""ROUGE-L and exact match of responses against references."""

import os
import string
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from types import SimpleNamespace

from todi.evaluation.rouge_tokens import choose_tokenizer, tokenize_by
from todi.settings import AUTO_TOKENIZER

WORTH_A_PROCESS = 2500  # responses; scoring them takes about as long as a process takes to start

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = AUTO_TOKENIZER,
            processes: int | None = None) -> list[float]:
    """ROUGE-L F1 of each response against the best of its references, 0 to 100.

    With the tokeniser rouge_score it is what the published evaluation computes.

    Args:
        tokenizer: one of `todi.settings.ROUGE_TOKENIZERS`; auto chooses by these references.
        processes: how many share the work; as many as there are cores, where that pays, when not given.

    Raises:
        ValueError: the two differ in length, or a response has no reference.
    """
    _check(responses, references)
    if tokenizer == AUTO_TOKENIZER:
        tokenizer = choose_tokenizer(tokenizer, references, "these texts")
    if processes is None:
        processes = max(1, min(os.cpu_count() or 1, len(responses) // WORTH_A_PROCESS))
    if processes == 1:
        return _scores(responses, references, tokenizer)
    size = -(-len(responses) // (4 * processes))  # several parts each, since some have longer texts
    starts = range(0, len(responses), size)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:  # forking a process with CUDA or threads hangs
        parts = pool.map(_scores, [responses[start:start + size] for start in starts],
                         [references[start:start + size] for start in starts], repeat(tokenizer))
        return [score for part in parts for score in part]


def exact_match(responses: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each response is one of its references, apart from case, punctuation and spacing.

    Raises:
        ValueError: the two differ in length, or a response has no reference.
    """
    _check(responses, references)
    return [_plain(response) in {_plain(text) for text in texts}
            for response, texts in zip(responses, references, strict=True)]


def _scores(responses: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer  # with nltk and scipy, a second of every start

    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokenize_by(tokenizer)))
    return [100 * scorer.score_multi(list(texts), response)["rougeL"].fmeasure
            for response, texts in zip(responses, references, strict=True)]


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _check(responses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(responses) != len(references):
        raise ValueError(f"{len(responses)} responses for {len(references)} lists of references")
    missing = next((index for index, texts in enumerate(references) if not texts), None)
    if missing is not None:
        raise ValueError(f"response {missing} has no reference")
