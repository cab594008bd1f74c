"""Numbers: sums, products and little stories about them; going on with a count, and counting what stands there.

What is right is computed here; the tests compute it again from the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import answer, choice, place, turn
from stages.measures.items import Item

EASY = (
    "1+1 2+3 4+4 5+2 3+6 7+1 6+4 8+2 9+5 6+7 5-2 7-3 9-4 8-6 10-7 6-1 2*3 4*2 5*5 3*3 10*4 2*8 6/2 8/4 10/5 9/3".split()
)
HARD = (
    "12+7 15+15 20+30 34+21 45+27 58+36 99+1 64+18 100+250 23+41 19-8 30-12 50-25 72-31 81-46 100-37 64-19 90-45"
    " 6*7 8*9 7*4 12*5 11*11 9*6 15*4 25*4 20/4 36/6 81/9 48/8 100/25 63/7 144/12 56/8 13*3 17+26 200-150 70+65"
).split()
WRITTEN = (
    "5 + 1 = 6\n3 x 4 = 12\n{0} {sign} {1} =",
    "2 + 2 = 4\n6 - 3 = 3\n{0} {sign} {1} =",
    "Question: How much is {0} {word} {1}?\nAnswer: {0} {word} {1} is",
)
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
STORIES = (
    ("apples", "Anna has {0} apples. She gets {1} more apples. Now the number of apples that she has is", "+"),
    ("birds", "{0} birds sit in a tree. {1} of them fly away. The number of birds that stay in the tree is", "-"),
    ("coins", "Tom has {0} coins in one hand and {1} coins in the other. The number of all his coins is", "+"),
    (
        "cakes",
        "There are {0} cakes on a table. The children eat {1} of them. The number of cakes that are left is",
        "-",
    ),
    ("boxes", "There are {0} boxes with {1} pencils in each. The number of pencils in all is", "*"),
)
NUMBERS = ((3, 2), (6, 4), (7, 2), (9, 5))


def arithmetic() -> Iterator[Item]:
    """Small numbers are told, larger ones are chosen among what slips would give."""
    for text in EASY:
        one, sign, other = _parts(text)
        name = f"arithmetic/{text}"
        yield answer(name, _written(name, one, sign, other), [str(result(one, sign, other))], match="numeric")
    for text in HARD:
        one, sign, other = _parts(text)
        name = f"arithmetic/{text}"
        right = result(one, sign, other)
        yield choice(name, _written(name, one, sign, other), f" {right}", [f" {slip}" for slip in _slips(right, name)])
    for key, story, sign in STORIES:
        for one, other in NUMBERS:
            name = f"arithmetic/{key} {one} and {other}"
            right = result(one, sign, other)
            wrong = [slip for slip in (one, other, right + 1, right + 3, right + 10) if slip != right]
            yield choice(name, story.format(one, other), f" {right}", [f" {slip}" for slip in dict.fromkeys(wrong)][:3])


def result(one: int, sign: str, other: int) -> int:
    """What comes out; a quotient is whole."""
    whole = {"+": one + other, "-": one - other, "*": one * other, "/": one // other}
    return whole[sign]


def _parts(text: str) -> tuple[int, str, int]:
    (sign,) = {*text} & {*WORDS}
    one, _, other = text.partition(sign)
    return int(one), sign, int(other)


def _written(name: str, one: int, sign: str, other: int) -> str:
    shown = {"*": "x", "/": "/"}.get(sign, sign)
    return turn(WRITTEN, name).format(one, other, sign=shown, word=WORDS[sign])


def _slips(right: int, name: str) -> list[int]:
    """Off by one, by ten, and by something else."""
    off = 2 + place(name) % 4
    return [right + 1, right + 10 if place(name) % 2 or right < 20 else right - 10, right + off]


COUNTED = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
THINGS = "apple cat star book fish tree ball cup".split()
STEPS = ((1, 1), (4, 1), (11, 1), (97, 1), (2, 2), (12, 2), (1, 2), (5, 5), (25, 5), (10, 10), (40, 10), (100, 100))
"""Where a count begins, and how far it goes each time."""
DOWN = ((10, 1), (25, 1), (50, 10), (100, 10), (20, 2), (30, 5))
LETTERS = ("A", "D", "H", "K", "P", "U")
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
LISTS = (
    ("red", "green", "blue"),
    ("bread", "milk", "eggs", "salt"),
    ("Anna", "Tom"),
    ("hammer", "saw", "drill", "wrench", "nail"),
    ("one dog", "one cat", "one bird"),
    ("Paris", "Rome", "Madrid", "Berlin"),
)
GOES_ON = ("The numbers go on like this:", "Numbers in a row:")
THINGS_SHOWN = (
    "{0}\nThe word {1} stands here this many times:",
    "dog dog: two dogs. bird bird bird: three birds. {0}:",
)


def counting() -> Iterator[Item]:
    """Counts upward, downward, in words and letters are told; things that stand there are chosen."""
    for first, step in (*STEPS, *((first, -step) for first, step in DOWN)):
        shown = [first + step * number for number in range(4)]
        name = f"counting/from {first} by {step}"
        yield answer(
            name, f"{turn(GOES_ON, name)} {', '.join(map(str, shown))},", [str(first + step * 4)], match="numeric"
        )
    for first in range(1, 12, 2):
        prompt = f"Count on: {', '.join(COUNTED[first : first + 3])},"
        yield answer(f"counting/words from {COUNTED[first]}", prompt, [COUNTED[first + 3]])
    for first in range(15, 5, -3):
        prompt = f"Count down: {', '.join(COUNTED[first - number] for number in range(3))},"
        yield answer(f"counting/words down from {COUNTED[first]}", prompt, [COUNTED[first - 3]])
    for letter in LETTERS:
        shown_letters = [chr(ord(letter) + number) for number in range(4)]
        yield answer(
            f"counting/letters from {letter}",
            f"The alphabet goes on: {', '.join(shown_letters)},",
            [chr(ord(letter) + 4)],
        )
    for first in range(0, 7, 2):
        yield answer(
            f"counting/{ORDINALS[first]}",
            f"In this order: {', '.join(ORDINALS[first : first + 3])},",
            [ORDINALS[first + 3]],
        )
    for many in range(2, 6):
        for thing in (THINGS[many - 2], THINGS[many], THINGS[many + 2]):
            yield _things(thing, many)
    yield from _lists()


def _things(thing: str, many: int) -> Item:
    name = f"counting/{many} times {thing}"
    told = turn(THINGS_SHOWN, name)
    plural = "" if told is THINGS_SHOWN[0] else f" {thing}s" if thing != "fish" else " fish"
    wrong = [one for one in (many - 1, many + 1, many + 2) if one > 1]
    prompt = told.format(" ".join([thing] * many), thing)
    return choice(name, prompt, f" {COUNTED[many]}{plural}", [f" {COUNTED[one]}{plural}" for one in wrong])


def _lists() -> Iterator[Item]:
    for number, names in enumerate(LISTS):
        name = f"counting/list {number + 1}"
        many = len(names)
        wrong = [f" {COUNTED[one]}" for one in range(2, 7) if one != many]
        off = place(name) % 2
        prompt = f"{', '.join(names)}. The number of things in this list is"
        yield choice(name, prompt, f" {COUNTED[many]}", wrong[off : off + 3])
