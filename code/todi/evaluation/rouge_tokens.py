"""How ROUGE-L cuts texts into the tokens that it compares, in every script.

    rouge_score   as the package of that name, and so as published: runs of a-z and 0-9, stemmed (Porter). All else
                  separates: a text in another script has no token, and scores 0 whatever it says.
    words         runs of letters, digits and their marks in any script, in lower case, after NFKC; not stemmed
    characters    as words, but in scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer,
                  Burmese) each character by itself, with its marks
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

from todi.settings import AUTO_TOKENIZER, ROUGE_TOKENIZERS

logger = logging.getLogger(__name__)

PUBLISHED, WORDS, CHARACTERS = (name for name in ROUGE_TOKENIZERS if name != AUTO_TOKENIZER)
_MANY = 0.1  # share of the letters

Tokenize = Callable[[str], list[str]]


def tokenize_by(name: str) -> Tokenize:
    """What cuts a text by the tokeniser of that name, which is not `auto`."""
    return {PUBLISHED: _published, WORDS: lambda: words, CHARACTERS: lambda: characters}[name]()


def _published() -> Tokenize:
    from rouge_score.tokenizers import DefaultTokenizer  # with nltk and scipy, a second of every start

    return DefaultTokenizer(use_stemmer=True).tokenize


def choose_tokenizer(wanted: str, references: Sequence[Sequence[str]], source: str) -> str:
    """The name of the tokeniser for texts that are scored against these references; says in the log which, and why.

    `auto` takes the published one unless more than a tenth of the letters of all references are of other scripts than
    Latin; then characters where any of these is of a script without spaces, else words.

    Args:
        wanted: one of `ROUGE_TOKENIZERS`.
        references: of each example.
        source: what the log calls them.
    """
    letters = _count_letters(references)
    others = (letters[_UNSPACED] + letters[_SPACED]) / max(letters.total(), 1)
    chosen, reason = wanted, "asked for"
    if wanted == AUTO_TOKENIZER:
        chosen = PUBLISHED if others <= _MANY else CHARACTERS if letters[_UNSPACED] else WORDS
        reason = f"{100 * others:.0f} % of the letters of the references are not Latin"
    logger.info("ROUGE-L of %s: tokens by %s (%s)", source, chosen, reason)
    if chosen == PUBLISHED:
        _warn_of_what_is_dropped(references, letters, source)
    return chosen


def words(text: str) -> list[str]:
    """'Wo ist das Haus?' -> ['wo', 'ist', 'das', 'haus']."""
    return _normal(text).translate(_SEPARATED).split()


def characters(text: str) -> list[str]:
    """'GPT 是模型' -> ['gpt', '是', '模', '型']."""
    return [token for word in words(text) for token in _CUT.findall(word)]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


class _Separated(dict):
    """A table for str.translate that keeps letters, digits and marks, drops what is not seen (joiners, directions),
    and makes a space of all else."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        self[code] = chr(code) if category[0] in "LMN" else "" if category == "Cf" else " "
        return self[code]


_SEPARATED = _Separated()

_SOUTH_EAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
_EAST_ASIAN = ("\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"  # Han, kana, bopomofo
               "\uf900-\ufaff\U00020000-\U0003ffff")
_WITHOUT_SPACES = _SOUTH_EAST_ASIAN + _EAST_ASIAN
_MARKS = "".join(chr(code) for block in (range(0x0E00, 0x0F00), range(0x1000, 0x10A0), range(0x1780, 0x1800))
                 for code in block if unicodedata.category(chr(code))[0] == "M")
_CUT = re.compile(f"[{_WITHOUT_SPACES}][{_MARKS}]*|[^{_WITHOUT_SPACES}]+")

# kinds of letters
_ASCII, _ACCENTED, _UNSPACED, _SPACED = "a-z", "other Latin ones", "of a script without spaces", "of one with spaces"


def _count_letters(references: Sequence[Sequence[str]]) -> Counter[str]:
    """How many letters of each kind there are."""
    kinds = Counter()
    for letter, count in Counter(_normal("".join(chain(*references)))).items():
        if letter.isalpha():
            kinds[_kind(letter)] += count
    return kinds


def _kind(letter: str) -> str:
    if letter.isascii():
        return _ASCII
    if unicodedata.name(letter, "").startswith("LATIN"):
        return _ACCENTED
    return _UNSPACED if re.match(f"[{_WITHOUT_SPACES}]", letter) else _SPACED


def _warn_of_what_is_dropped(references: Sequence[Sequence[str]], letters: Counter[str], source: str) -> None:
    blind = sum(not re.search("[a-z0-9]", " ".join(texts).lower()) and any(map(words, texts)) for texts in references)
    if blind:
        logger.warning("warning: ROUGE-L of %s: %d of %d examples score 0 whatever the response, for %s reads a-z and "
                       "0-9 alone; --rouge-tokenizer %s or %s reads all", source, blind, len(references), PUBLISHED,
                       WORDS, CHARACTERS)
    accented = letters[_ACCENTED] / max(letters.total(), 1)
    if accented > _MANY:
        logger.warning("warning: ROUGE-L of %s: %.0f %% of the letters have accents, which %s takes for spaces; "
                       "--rouge-tokenizer %s reads them", source, 100 * accented, PUBLISHED, WORDS)
