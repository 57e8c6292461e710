"""From the logits of the next token to the token.

An example's random numbers follow from its own stream alone, and they are used in a way that a rounding error
of the logits hardly ever turns into another token, so that a text does not depend on what shared its batch.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

# Entries of the vocabulary whose mass is summed in one go before a tree is built, which reads all of it once only.
_LEAVES = 256


def stream_key(*parts: str | int) -> int:
    """A stable 128-bit name for the random stream of, say, (set, seed, example)."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest(), "big")


def uniforms(key: int, steps: int, vocabulary: int) -> Tensor:
    """(steps, levels) numbers in [0, 1) from the stream `key`: what `draw` takes for `steps` tokens."""
    levels = (vocabulary - 1).bit_length()
    generator = np.random.Generator(np.random.Philox(key=key))  # the same on every device and platform
    return torch.from_numpy(generator.random((steps, levels), dtype=np.float32))


class Streams:
    """The random numbers of rows of which each is at a step of its own.

    Args:
        keys: of each row, from `stream_key`.
        steps: most tokens of a row.
        logits: (B, V) of any values, for the vocabulary and the device.
    """

    def __init__(self, keys: Sequence[int], steps: int, logits: Tensor):
        self._vocabulary = logits.shape[1]
        self._numbers = logits.new_empty((0, steps, (self._vocabulary - 1).bit_length()), dtype=torch.float32)
        self._step = torch.empty(0, dtype=torch.long, device=logits.device)
        self.add(keys)

    def add(self, keys: Sequence[int]) -> None:
        """Goes on with more rows, which are at their first step."""
        new = torch.stack([uniforms(key, self._numbers.shape[1], self._vocabulary) for key in keys])
        self._numbers = torch.cat([self._numbers, new.to(self._numbers.device)])
        self._step = torch.cat([self._step, self._step.new_zeros(len(keys))])

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with the rows at `places`."""
        index = torch.tensor(places, device=self._step.device)
        self._numbers, self._step = self._numbers[index], self._step[index]

    def draw(self, probabilities: Tensor) -> Tensor:
        """The next token (B,) of each row by the module's `draw`; (B, V) -> (B,)."""
        # A finished row that is not dropped yet may run over its end; nobody reads it.
        numbers = self._numbers[torch.arange(len(self._step), device=self._step.device),
                                self._step.clamp(max=self._numbers.shape[1] - 1)]
        self._step += 1
        return draw(probabilities, numbers)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Samples one token a row by walking down a binary tree of probability mass.

    The inverse CDF with a single number has a boundary for each entry of the vocabulary, and a change of the
    logits in the sixth digit (another batch size is enough) moves all of them: with SmolLM2's 49,152 entries
    one token in 2,000 changes, which is one response in twenty. Here a level has one boundary: one token in a
    million changes.

    Args:
        probabilities: (B, V), not negative, of any positive sum.
        uniforms: (B, ceil(log2 V)) in [0, 1).

    Returns:
        (B,) token ids; never one of zero probability.
    """
    size = min(_LEAVES, 1 << (probabilities.shape[1] - 1).bit_length())
    if probabilities.shape[1] % size:
        probabilities = torch.nn.functional.pad(probabilities, (0, -probabilities.shape[1] % size))
    groups = probabilities.unflatten(1, (-1, size))
    levels = groups.shape[1] - 1
    group = _descend(groups.sum(2), uniforms[:, :levels.bit_length()])
    leaves = groups[torch.arange(len(groups), device=group.device), group]
    return group * size + _descend(leaves, uniforms[:, levels.bit_length():])


def _descend(masses: Tensor, uniforms: Tensor) -> Tensor:
    """The leaf (B,) under a binary tree of the masses (B, n), by one number (B, levels) a level."""
    levels = _mass_tree(masses)
    node = torch.zeros(len(masses), 1, dtype=torch.long, device=masses.device)
    for nodes, uniform in zip(reversed(levels), uniforms.unbind(1), strict=True):
        half = nodes.shape[1] // 2
        left, right = nodes.gather(1, node), nodes.gather(1, node + half)
        goes_right = (uniform[:, None] * (left + right) >= left) & (right > 0)
        node = torch.where(goes_right, node + half, node)
    return node.squeeze(1)


def _mass_tree(masses: Tensor) -> list[Tensor]:
    """Masses of the nodes below the root, leaves first; node i of n has the children i and i + n."""
    depth = (masses.shape[1] - 1).bit_length()
    levels = [torch.nn.functional.pad(masses, (0, (1 << depth) - masses.shape[1]))]
    while levels[-1].shape[1] > 2:
        levels.append(sum(levels[-1].chunk(2, dim=1)))
    return levels[:depth]


def next_token_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0,
                             top_p: float = 1.0) -> Tensor:
    """(B, V) logits -> (B, V) float32 probabilities of what may be sampled.

    Args:
        top_k: only the k most likely tokens (and those that tie with the last of them); 0 is off.
        top_p: only the smallest set of most likely tokens whose mass is at least this; 1 is off.
    """
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if 0 < top_k < logits.shape[1]:
        weakest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    # A token belongs to the nucleus when those before it do not fill it; so the first always does.
    outside = (ranked.cumsum(-1) - ranked) >= top_p
    return probabilities.masked_fill(outside.scatter(1, order, outside), 0)


class RepetitionBan:
    """Makes the tokens impossible that would repeat an n-gram of their row, prompt included.

    It costs constant time a token and row, however long the text is.

    Args:
        size: the n of the n-grams that may occur once only; 0 bans nothing.
        prompts: token ids of each row.
    """

    def __init__(self, size: int, prompts: Sequence[Sequence[int]]):
        self._size = size
        self._rows: list[_NGrams] = []
        self.add(prompts)

    def add(self, prompts: Sequence[Sequence[int]]) -> None:
        """Goes on with more rows."""
        if self._size:
            self._rows += [_NGrams(self._size, prompt) for prompt in prompts]

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) logits of the next tokens, -inf where one is banned."""
        pairs = [(place, token) for place, row in enumerate(self._rows) for token in row.followers()]
        if not pairs:
            return logits
        places, tokens = torch.tensor(pairs, device=logits.device).T
        return logits.index_put((places, tokens), logits.new_tensor(-torch.inf))

    def append(self, tokens: Sequence[int]) -> None:
        """Takes note of the next token of each row."""
        for row, token in zip(self._rows, tokens, strict=bool(self._rows)):
            row.append(token)

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with the rows at `places`."""
        self._rows = [self._rows[place] for place in places] if self._rows else []


class _NGrams:
    """The n-grams of a growing text: what has followed each run of n - 1 tokens."""

    def __init__(self, size: int, tokens: Iterable[int]):
        self._followers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._tail: deque[int] = deque(maxlen=size - 1)
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        if len(self._tail) == self._tail.maxlen:
            self._followers[tuple(self._tail)].append(token)
        self._tail.append(token)

    def followers(self) -> Sequence[int]:
        """What has followed the last n - 1 tokens before."""
        return self._followers.get(tuple(self._tail), ())
