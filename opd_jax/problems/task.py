# SPDX-License-Identifier: Apache-2.0
"""The embedded task: seeded multi-step problems, with solutions written as English prose.

Five families to distil on (`IN_DOMAIN`) and one, `smallest`, that the embedded models met in
pretraining but that is never among distillation's prompts (`OUT_OF_DOMAIN`), as GPQA is not among
a real run's.

Every solution walks through the problem in 5 to 11 sentences and ends with `The answer is
\\boxed{...}.`; one slip on the way usually makes the answer wrong. A `Style` writes solutions that
slip on purpose: that is what the weak students of the embedded pairs learned from.

Train and held-out problems are disjoint by construction: a hash of the problem's content (its
numbers, names and order, not its wording) decides on which side it falls, whatever the seed or the
index.

Left out: word problems that need arithmetic beyond twenty; every quantity is one word.
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable

NUMBERS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty".split()
)
NAMES = tuple("Ann Bob Cara Dan Eve Finn Gus Hana".split())  # in the order they come
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
POINTS = tuple("north east south west".split())
TURNS = {"right": 1, "around": 2, "left": 3}  # quarters of a circle, clockwise
MOST_ROUGH = 18  # aimless sentences of a solution
ROUGH = (  # one word of each: "Perhaps we should think about that part again."
    "Perhaps Maybe Surely Possibly".split(),
    "we you they one".split(),
    "should could might would".split(),
    "think look wonder worry".split(),
    "about around over past".split(),
    "that this every another".split(),
    "part spot piece corner".split(),
    "again later somehow instead".split(),
)

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 8  # one content in eight is held out


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem. `prompt` is the user's message, or a tuple of chat messages (role, content)."""

    id: str
    family: str
    prompt: str | tuple[tuple[str, str], ...]
    answer: str
    solution: str = ""  # a reference solution; "" where a data set has none


@dataclasses.dataclass(frozen=True)
class Style:
    """How a solution is written. The default makes no mistake: a reference solution."""

    slip: float = 0.0  # chance per sentence of a wrong result, from which the walk then goes on
    rough: int = 0  # least number of aimless sentences from the first slip to the answer; 0 = none


REFERENCE = Style()


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a family writes. `content` is the problem without its wording: it decides the split."""

    content: str
    prompt: str
    answer: str  # the right one
    written: str  # the one the sentences come to
    sentences: tuple[str, ...]  # the solution, without the closing sentence


class Writer:
    """Decides what a sentence gives as its result: the right one, or by `style.slip` another.

    Has randomness of its own, so that the problem is the same whatever the style.
    """

    def __init__(self, style: Style, seed: str):
        self.style = style
        self.rng = random.Random(seed)
        self.results = 0  # how many were written
        self.right_results = None  # how many were written before the first slip; None = no slip

    def result(self, right: int, choices) -> int:
        slips = self.rng.random() < self.style.slip
        if slips and self.right_results is None:
            self.right_results = self.results
        self.results += 1
        return self.rng.choice([c for c in choices if c != right]) if slips else right

    def muse(self, sentences: tuple[str, ...]) -> tuple[str, ...]:
        """The sentences, those after the first slip replaced by about twice as many rough ones."""
        least = self.style.rough
        if not least or self.right_results is None:
            return sentences
        kept = sentences[: self.right_results + 2]  # the opening, and the slip itself
        count = 2 * (len(sentences) - len(kept)) + self.rng.randint(least, least + 2)
        count = min(count, MOST_ROUGH)
        rough = (" ".join(self.rng.choice(words) for words in ROUGH) + "." for _ in range(count))
        return (*kept, *rough)


def _opener(rng: random.Random, sentence: str) -> str:
    """The sentence with one of three ways to begin."""
    return rng.choice(("", "Then ", "Next ")) + sentence


def _signed(rng: random.Random, name: str, amount: int, old: str, new: str) -> str:
    """One step of a walk up and down: the operands first, then the result."""
    k = NUMBERS[abs(amount)]
    act, way, end = ("adds", "to", "making") if amount > 0 else ("takes", "from", "leaving")
    end = rng.choice((f", {end}", " and we have"))
    return _opener(rng, f"{name} {act} {k} {way} {old}{end} {new}.")


def _moves(amounts: list[int]) -> str:
    """The story of such a walk."""
    return " ".join(
        f"{name} {'adds' if amount > 0 else 'takes'} {NUMBERS[abs(amount)]}."
        for name, amount in zip(NAMES, amounts, strict=False)
    )


def _total(rng: random.Random, writer: Writer) -> Problem:
    """A running sum from zero to twenty."""
    start = total = rng.randint(0, 20)
    amounts = []
    for _ in range(rng.randint(4, 8)):
        adds = rng.random() < 0.5 if 0 < total < 20 else total == 0
        amount = rng.randint(1, min(6, 20 - total if adds else total))
        amounts.append(amount if adds else -amount)
        total += amounts[-1]
    steps, old = [], start
    for name, amount in zip(NAMES, amounts, strict=False):
        new = writer.result(min(max(old + amount, 0), 20), range(21))
        steps.append(_signed(rng, name, amount, NUMBERS[old], NUMBERS[new]))
        old = new
    story = f"A box holds {NUMBERS[start]} coins and {NUMBERS[len(amounts)]} people come."
    story = f"{story} {_moves(amounts)}"
    first = rng.choice(("We start with {}.", "The box holds {} first.")).format(NUMBERS[start])
    prompt = f"{story} How many coins are there?"
    return Problem(story, prompt, NUMBERS[total], NUMBERS[old], (first, *steps))


def _calendar(rng: random.Random, writer: Writer) -> Problem:
    """A running sum modulo seven."""
    start = rng.randrange(7)
    amounts = [rng.choice((-3, -2, -1, 1, 2, 3)) for _ in range(rng.randint(4, 8))]
    steps, old = [], start
    for name, amount in zip(NAMES, amounts, strict=False):
        new = writer.result((old + amount) % 7, range(7))
        steps.append(_signed(rng, name, amount, DAYS[old], DAYS[new]))
        old = new
    story = f"A calendar shows {DAYS[start]} and {NUMBERS[len(amounts)]} people come."
    story = f"{story} {_moves(amounts)}"
    first = rng.choice(("We start on {}.", "The calendar shows {} first.")).format(DAYS[start])
    prompt = f"{story} Which day does it show?"
    return Problem(story, prompt, DAYS[(start + sum(amounts)) % 7], DAYS[old], (first, *steps))


def _heading(rng: random.Random, writer: Writer) -> Problem:
    """A state machine: a boat that turns."""
    start = point = rng.randrange(4)
    turns = [rng.choice(tuple(TURNS)) for _ in range(rng.randint(4, 8))]
    people, steps, old = NAMES[: len(turns)], [], start
    for name, turn in zip(people, turns, strict=True):
        point = (point + TURNS[turn]) % 4
        new = writer.result((old + TURNS[turn]) % 4, range(4))
        end = rng.choice(("to", "and we face"))
        steps.append(
            _opener(rng, f"{name} turns it {turn} from {POINTS[old]} {end} {POINTS[new]}.")
        )
        old = new
    story = " ".join(f"{n} turns it {turn}." for n, turn in zip(people, turns, strict=True))
    story = f"A boat faces {POINTS[start]} and {NUMBERS[len(turns)]} people come. {story}"
    first = rng.choice(("We start at {}.", "The boat faces {} first.")).format(POINTS[start])
    prompt = f"{story} Where does it face?"
    return Problem(story, prompt, POINTS[point], POINTS[old], (first, *steps))


def _deal(numbers: list[int]) -> str:
    """The story of the families that look at one card after the other."""
    cards = zip(NAMES, numbers, strict=False)
    story = " ".join(f"{name} has {NUMBERS[number]}." for name, number in cards)
    return f"We deal {NUMBERS[len(numbers)]} cards. {story}"


def _extreme(rng: random.Random, writer: Writer, word: str, better: Callable[..., int]) -> Problem:
    """The largest (smallest) number so far."""
    low = rng.randint(0, 9)  # a range of its own per problem: the answer cannot be guessed
    numbers = rng.sample(range(low, low + 9), rng.randint(5, 8))
    best, steps = numbers[0], []
    for name, number in zip(NAMES[1:], numbers[1:], strict=False):
        k, old = NUMBERS[number], NUMBERS[best]
        best = writer.result(better(number, best), numbers)
        steps.append(
            _opener(rng, f"{name} has {k} against {old}, so the {word} is {NUMBERS[best]}.")
        )
    k, who = NUMBERS[numbers[0]], NAMES[0]
    first = rng.choice((f"We start with {who} at {k}.", f"First {who} has {k}, the {word} so far."))
    story, right = _deal(numbers), NUMBERS[better(numbers)]
    prompt = f"{story} Which number is the {word}?"
    return Problem(f"{word} {story}", prompt, right, NUMBERS[best], (first, *steps))


def _largest(rng: random.Random, writer: Writer) -> Problem:
    return _extreme(rng, writer, "largest", max)


def _smallest(rng: random.Random, writer: Writer) -> Problem:
    return _extreme(rng, writer, "smallest", min)


def _count(rng: random.Random, writer: Writer) -> Problem:
    """How many numbers are even."""
    numbers = [rng.randint(0, 20) for _ in range(rng.randint(5, 8))]
    count, steps = 0, []
    for name, number in zip(NAMES, numbers, strict=False):
        k, is_even, old = NUMBERS[number], number % 2 == 0, NUMBERS[count]
        count = writer.result(count + is_even, (count, count + 1))
        parity, end = ("even", "becomes") if is_even else ("odd", "stays")
        steps.append(_opener(rng, f"{name} has {k}, {parity}, so {old} {end} {NUMBERS[count]}."))
    first = rng.choice(("We start at zero.", "The count is zero first."))
    story, right = _deal(numbers), sum(number % 2 == 0 for number in numbers)
    prompt = f"{story} How many numbers are even?"
    return Problem(f"even {story}", prompt, NUMBERS[right], NUMBERS[count], (first, *steps))


FAMILIES: dict[str, Callable[[random.Random, Writer], Problem]] = {
    "total": _total,
    "largest": _largest,
    "count": _count,
    "calendar": _calendar,
    "heading": _heading,
    "smallest": _smallest,
}
IN_DOMAIN = ("total", "largest", "count", "calendar", "heading")
OUT_OF_DOMAIN = ("smallest",)


def split_of(content: str) -> str:
    """The split a problem belongs to: a function of its content alone."""
    return SPLITS[hashlib.sha256(content.encode()).digest()[0] % HELDOUT_SHARE == 0]


def make(family: str, split: str, seed: int, index: int, style: Style = REFERENCE) -> Example:
    """Problem number `index` of a family and split. The same arguments give the same problem.

    `style` changes the solution alone.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown; choose from {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose 'train' or 'heldout'")
    name = f"{family}/{split}/{seed}/{index}"
    rng = random.Random(name)
    while True:  # a problem of the other split is thrown away: 8/7 (8) draws on average
        writer = Writer(style, name)
        problem = FAMILIES[family](rng, writer)
        if split_of(f"{family} {problem.content}") == split:
            break
    sentences = (*writer.muse(problem.sentences), f"The answer is \\boxed{{{problem.written}}}.")
    return Example(
        id=f"{family}-{split}-{seed}-{index}",
        family=family,
        prompt=problem.prompt,
        answer=problem.answer,
        solution=" ".join(sentences),
    )


def make_many(
    families: tuple[str, ...], split: str, seed: int, num: int, style: Style = REFERENCE
) -> list[Example]:
    """`num` problems that take the families in turn."""
    return [make(families[i % len(families)], split, seed, i, style) for i in range(num)]
