"""A small instruction data set made from a seed: every kind of task is one function that drafts an example.

    PYTHONPATH=code python data/demo/make_demo.py

writes `train.jsonl`, `dev.jsonl` and `valid.jsonl`; the same seed gives the same bytes. The splits share kinds of
task and ways of asking, but no answer: the words of an answer, in whatever order, occur once within a kind, so a
held-out record cannot be solved by recalling a training record.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import demo_words as words
from todi.data.templates import alpaca_prompt

SPLITS = {"train": 60, "dev": 6, "valid": 8}  # records of each kind


class Draft(NamedTuple):
    """One example before an instruction is worded: `asks` fills the places {0}, {1} of the wording."""

    output: str
    input: str = ""
    asks: tuple[str, ...] = ()


Maker = Callable[[random.Random], Draft]
KINDS: dict[str, tuple[tuple[str, ...], Maker]] = {}


def kind(*wordings: str) -> Callable[[Maker], Maker]:
    """Register a maker of drafts, under its own name, with the ways to word its instruction."""

    def register(maker: Maker) -> Maker:
        KINDS[maker.__name__] = (wordings, maker)
        return maker

    return register


def draw_cast(rng: random.Random) -> dict[str, str]:
    """Draw a value for every slot of the sentence patterns: people, places, things, times and numbers."""
    group, others, pronouns = rng.choice([
        (words.WOMEN, words.MEN, ("she", "her", "her")), (words.MEN, words.WOMEN, ("he", "his", "him"))])
    they, their, them = pronouns
    name, friend = rng.choice(group), rng.choice(others)
    town, city = rng.sample(words.TOWNS, 2)
    cast = {slot: rng.choice(bank) for slot, bank in words.BANKS.items()}
    cast |= {f"a_{slot}": with_article(noun) for slot, noun in cast.items()}
    return cast | {
        "name": name, "full": f"{name} {rng.choice(words.SURNAMES)}", "friend": friend,
        "they": they, "They": capital(they), "their": their, "them": them, "town": town, "city": city,
        "day": rng.choice(words.DAYS), "year": str(rng.randint(1985, 2019)),
        "age": str(rng.randint(20, 79)), "few": str(rng.randint(3, 9)), "n": str(rng.randint(11, 40)),
        "time": f"{rng.randint(5, 9)} pm", "price": f"{rng.randint(15, 95)} euros",
        "sum": str(10 * rng.randint(12, 98)), "fortune": f"{1000 * rng.randint(21, 98):,}"}


def capital(text: str) -> str:
    """Start the text with a capital letter."""
    return text[0].upper() + text[1:]


def with_article(noun: str) -> str:
    """Put "a" or "an" before the noun; the first letter decides, so the banks hold no "hour" or "unit"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listing(items: list[str]) -> str:
    """Join items as a sentence does: "a, b and c"."""
    return f"{', '.join(items[:-1])} and {items[-1]}"


def two_sides(text: str) -> tuple[str, str]:
    """Read the marks `one>other` in a text: the text with every first word, and with every second word."""
    return re.sub(r">[\w']+", "", text), re.sub(r"[\w']+>", "", text)


@kind("Answer the question from the text. {0}", "Read the text and answer: {0}", "According to the text: {0}",
      "{0} Answer in one sentence, using the text.")
def question(rng: random.Random) -> Draft:
    """A question about a fact of a short passage."""
    text, _, answers = rng.choice(words.STORIES)
    asked, answer = rng.choice(list(answers.items()))
    cast = draw_cast(rng)
    return Draft(answer.format(**cast), text.format(**cast), (asked.format(**cast),))


@kind("Summarise the text in one sentence.", "Write a one-sentence summary of this text.",
      "What is the main point of the text? Answer in one sentence.", "Shorten the text to a single sentence.")
def summary(rng: random.Random) -> Draft:
    """A short passage told in one sentence."""
    text, short, _ = rng.choice(words.STORIES)
    cast = draw_cast(rng)
    return Draft(short.format(**cast), text.format(**cast))


@kind("Make this request more polite.", "Rewrite the sentence as a polite request.",
      "Say this in a friendlier way.", "Turn the order into a polite question.")
def polite(rng: random.Random) -> Draft:
    """A blunt order as a polite request."""
    cast = draw_cast(rng)
    order, deadline = rng.choice(words.ORDERS), rng.choice(words.DEADLINES).format(**cast)
    address = f"{cast['name']}, " if "{name}" in order else ""
    request = f"{address}could you please {cast['chore']} {deadline}? Thank you very much."
    return Draft(capital(request), capital(order.format(**cast, when=deadline)))


@kind("Rewrite the sentence in the past tense.", "Change the verbs to the past tense.",
      "Put this sentence into the past.", "Say the same thing about the past.")
def past_tense(rng: random.Random) -> Draft:
    """A sentence in the present, moved to the past."""
    a, b = rng.sample(words.ACTIONS, 2)
    marked = rng.choice(words.TENSES).format(**draw_cast(rng), a=a, b=b)
    present, past = two_sides(marked)
    return Draft(past, present)


@kind("Rewrite the sentence in the passive voice.", "Change this sentence from active to passive.",
      "Put the sentence into the passive.", "Turn the active sentence into a passive one.")
def passive(rng: random.Random) -> Draft:
    """A sentence in the active voice, made passive."""
    cast = draw_cast(rng)
    past, participle, things = rng.choice(words.DEEDS)
    thing = rng.choice(things.split(", "))
    agent, when = (rng.choice(bank).format(**cast) for bank in (words.AGENTS, words.OCCASIONS))
    was = "were" if thing.endswith("s") else "was"
    pattern = rng.choice(["{when}, {clause}.", "{clause} {when}."])
    clauses = f"{thing} {was} {participle} by {agent}", f"{agent} {past} {thing}"
    return Draft(*(capital(pattern.format(when=when, clause=clause)) for clause in clauses))


@kind("Correct the mistakes in the sentence.", "Fix the spelling and grammar.",
      "Rewrite the sentence without errors.", "Find the mistakes and write the correct sentence.")
def correct(rng: random.Random) -> Draft:
    """A sentence with two mistakes of spelling or grammar, put right."""
    a, b = rng.sample(words.MISTAKES, 2)
    wrong, right = two_sides(rng.choice(words.MISTAKE_FRAMES).format(**draw_cast(rng), a=a, b=b))
    return Draft(right, wrong)


@kind("Is this review positive, negative or mixed? Say why.", "Judge the mood of the review and explain it.",
      "Classify the review as positive, negative or mixed, with reasons.",
      "What is the sentiment of this review? Give the reason.")
def sentiment(rng: random.Random) -> Draft:
    """The sentiment of a review of two points, with the points as the reason."""
    opening, good, bad = rng.choice(words.REVIEWS)
    sides = {"positive": (good, good), "negative": (bad, bad), "mixed": rng.sample([good, bad], 2)}
    verdict = rng.choice(list(sides))
    places = rng.sample(range(good.count(", ") + 1), 2)
    a, b = (side.split(", ")[place] for side, place in zip(sides[verdict], places, strict=True))
    pattern, link = (words.MIXED_VIEW, ", but") if verdict == "mixed" else (words.SAME_VIEW, " and")
    text = f"{opening.format(**draw_cast(rng))}. {capital(rng.choice(pattern).format(a=a, b=b))}"
    return Draft(f"The review is {verdict}, because the writer says that {a}{link} {b}.", text)


@kind("Sort these words alphabetically.", "Put the words in alphabetical order.",
      "Arrange the list from A to Z.", "Write these words in alphabetical order.")
def sort_words(rng: random.Random) -> Draft:
    """A list of words in alphabetical order."""
    chosen = rng.sample([thing for _, _, things in words.THINGS for thing in things], 6)
    return Draft(f"In alphabetical order: {', '.join(sorted(chosen))}.", ", ".join(chosen))


@kind("Sort the numbers {0}.", "Put these numbers in order {0}.", "Arrange the numbers {0}.",
      "Write the list of numbers in order {0}.")
def sort_numbers(rng: random.Random) -> Draft:
    """A list of numbers in rising or falling order."""
    numbers = rng.sample(range(1, 200), rng.randint(5, 6))
    falling = rng.random() < 0.5
    order = "from largest to smallest" if falling else "from smallest to largest"
    listed, ordered = (", ".join(map(str, row)) for row in (numbers, sorted(numbers, reverse=falling)))
    return Draft(f"{capital(order)}: {ordered}.", listed, (order,))


@kind("Convert {0} to {1}. Show the calculation.", "How many {1} are there in {0}?", "Express {0} in {1}.",
      "What is {0} in {1}? Show how you work it out.")
def convert(rng: random.Random) -> Draft:
    """A conversion between two units, with its calculation."""
    large, small, size = rng.choice(words.UNITS)
    amount, factor = rng.randint(2, 60), int(size)
    few, many = f"{amount} {large}", f"{amount * factor:,} {small}"
    if rng.random() < 0.5:
        return Draft(f"{capital(few)} is {many}, because {amount} × {factor:,} = {amount * factor:,}.",
                     asks=(few, small))
    return Draft(f"{capital(many)} is {few}, because {amount * factor:,} ÷ {factor:,} = {amount}.",
                 asks=(many, large))


FACTS = (
    *words.SCIENCE,
    *((f"What is the capital of {country}?",
       f"The capital of {country}, a country in {continent}, is {city}.")
      for continent, cities in words.CAPITALS for country, city in cities.items()),
    *((f"What is the chemical symbol for {element}?",
       f"The chemical symbol for {element} is {symbol}, and its atomic number is {number}.")
      for element, symbol, number in words.ELEMENTS),
)


@kind("{0}", "Answer in one sentence. {0}", "Please answer this question: {0}", "{0} Use a full sentence.")
def fact(rng: random.Random) -> Draft:
    """A question of general knowledge."""
    asked, answer = rng.choice(FACTS)
    return Draft(answer, asks=(asked,))


@kind("Solve the problem.", "Work out the answer and show the sum.", "Answer this arithmetic question.",
      "Solve this word problem in one sentence.")
def word_problem(rng: random.Random) -> Draft:
    """An arithmetic problem of one step, answered with its sum."""
    a, b, k, m = rng.randint(12, 60), rng.randint(12, 60), rng.randint(3, 9), rng.randint(4, 12)
    cast = draw_cast(rng) | {
        "a": a, "b": b, "k": k, "m": m, "a_plus_b": a + b, "a_minus_k": a - k, "k_times_m": k * m}
    problem, answer = rng.choice(words.PROBLEMS)
    return Draft(answer.format(**cast), problem.format(**cast))


@kind("List the {0} named in the text.", "Which {0} does the text mention?", "Find all {0} in the sentence.",
      "Name every one of the {0} in the text.")
def list_items(rng: random.Random) -> Draft:
    """The things of one category in a sentence that also names things of another."""
    (_, plural, wanted), (_, _, other) = rng.sample(words.THINGS, 2)
    wanted = rng.sample(list(wanted), rng.randint(2, 3))
    mixed = [with_article(thing) for thing in wanted + rng.sample(list(other), 2)]
    rng.shuffle(mixed)
    found = [thing for thing in mixed if thing.split()[1] in wanted]
    text = rng.choice(words.PICTURES).format(**draw_cast(rng), x=listing(mixed))
    return Draft(f"The {plural} in the text are {listing(found)}.", text, (plural,))


@kind("Fill in the form with these fields: {0}.", "Extract these fields from the sentence: {0}.",
      "Write the details as a form with the fields {0}.", "From the sentence, give the following: {0}.")
def form(rng: random.Random) -> Draft:
    """A form of `key: value` lines, filled in from a sentence."""
    fields, sentences = rng.choice(words.FORMS)
    cast = draw_cast(rng)
    lines = "\n".join(f"{field}: {cast[slot]}" for field, slot in fields.items())
    return Draft(lines, rng.choice(sentences).format(**cast), (", ".join(fields),))


@kind("Compare the two in one sentence.", "How do these two differ?", "Write a sentence that compares them.",
      "Compare these two using the numbers given.")
def compare(rng: random.Random) -> Draft:
    """Two things compared by two numbers each."""
    things, *measures = rng.choice(words.COMPARED)
    pair = rng.sample(things.split(", "), 2)
    columns, results = [], []
    for measure in measures:
        unit, low, high, best, comparative = measure.split(", ")
        values = rng.sample(range(int(low), int(high) + 1), 2)
        winner = values.index({"low": min, "high": max}[best](values))
        columns.append([f"{value} {unit}" for value in values])
        results.append((pair[winner], comparative))
    text = "\n".join(f"{thing}: {x}, {y}" for thing, x, y in zip(pair, *columns, strict=True))
    (first, more), (second, also) = results
    other = pair[1 - pair.index(first)]
    if first == second:
        return Draft(f"The {first} is both {more} and {also} than the {other}.", text)
    return Draft(f"The {first} is {more} than the {other}, but the {other} is {also}.", text)


@kind("Which word is the odd one out, and why?", "Find the word that does not belong and say why.",
      "Pick the odd one out and give the reason.", "One of these does not fit. Which one, and why?")
def odd_one_out(rng: random.Random) -> Draft:
    """The one thing of another category among four, with the reason."""
    (_, plural, things), (label, _, strangers) = rng.sample(words.THINGS, 2)
    odd = rng.choice(list(strangers))
    chosen = [odd, *rng.sample(list(things), 3)]
    rng.shuffle(chosen)
    reason = f"it is {with_article(label)} and the others are {plural}"
    return Draft(f"The odd one out is the {odd}, because {reason}.", ", ".join(chosen))


@kind("What is {1}? Answer in one sentence.", "Explain the word \"{0}\" in one sentence.",
      "Define the word \"{0}\".", "Say in one sentence what {1} is.")
def define(rng: random.Random) -> Draft:
    """A word explained in one sentence."""
    label, _, things = rng.choice(words.THINGS)
    thing, clause = rng.choice(list(things.items()))
    named = with_article(thing)
    return Draft(f"{capital(named)} is {with_article(label)} that {clause}.", asks=(thing, named))


@kind("Write a short message to {0} {1}.", "Draft a brief text to {0} {1}.",
      "Help me write a note to {0} {1}.", "I need a short message to {0} {1}. Please write it.")
def message(rng: random.Random) -> Draft:
    """A message of one or two sentences."""
    purpose, text = rng.choice(words.MESSAGES)
    cast = draw_cast(rng)
    return Draft(text.format(**cast), asks=(cast["name"], purpose.format(**cast)))


@kind("Turn the list into a sentence.", "Write the list as one full sentence.",
      "Rewrite these notes as a sentence.", "Make one sentence out of this list.")
def list_to_sentence(rng: random.Random) -> Draft:
    """A list under a heading, written as a sentence."""
    heading, sentence, bank = rng.choice(words.LISTS)
    items = rng.sample(bank.split(", "), rng.randint(3, 4))
    cast = draw_cast(rng)
    lines = [f"{heading.format(**cast)}:", *(f"- {item}" for item in items)]
    return Draft(sentence.format(**cast, x=listing(items)), "\n".join(lines))


@kind("Extract three keywords from the text.", "List the three keywords of this text.",
      "Which three key terms sum up the text?", "Give three keywords for the text.")
def keywords(rng: random.Random) -> Draft:
    """The place, the means and the aim that a sentence is about, in the order of the text."""
    means, aim = rng.choice(words.MEASURES)
    place = rng.choice(words.PLACES)
    text = capital(rng.choice(words.PLANS).format(**draw_cast(rng), place=place, means=means, aim=aim))
    found = sorted((place, means, aim), key=text.lower().index)
    return Draft(f"The keywords are {listing(found)}.", text)


def draw_records(name: str, count: int, seed: int) -> list[dict[str, str]]:
    """Draw `count` records of one kind, no two of which answer with the same words in whatever order."""
    wordings, maker = KINDS[name]
    rng = random.Random(f"{seed}/{name}")
    records: dict[tuple[str, ...], dict[str, str]] = {}
    for _ in range(100 * count):
        draft = maker(rng)
        instruction = rng.choice(wordings).format(*draft.asks)
        prompt = alpaca_prompt(instruction, draft.input)
        answer = tuple(sorted(re.findall(r"\w+", draft.output.lower())))
        records.setdefault(answer, {"instruction": instruction, "input": draft.input, "output": draft.output,
                                    "prompt": prompt, "kind": name})
        if len(records) == count:
            return list(records.values())
    raise ValueError(f"the word banks of {name!r} are too small for {count} different answers")


def make_splits(seed: int) -> dict[str, list[dict[str, str]]]:
    """Make all splits; the kinds take turns, so any first part of a split is balanced too."""
    drawn = [draw_records(name, sum(SPLITS.values()), seed) for name in KINDS]
    turns = iter(zip(*drawn, strict=True))
    return {split: [record for _ in range(size) for record in next(turns)] for split, size in SPLITS.items()}


def main(argv: list[str] | None = None) -> None:
    """Write the splits as JSON lines."""
    parser = argparse.ArgumentParser(description="Write the demo instruction data set.")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder of the files")
    parser.add_argument("--seed", type=int, default=10)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, records in make_splits(args.seed).items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (args.out / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
