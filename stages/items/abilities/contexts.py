"""Copying what stands in the prompt, and finding a fact in it. Names are made up where the world must not help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stages.items.abilities.making import answer, others, place
from stages.measures.items import Item

_HEADS = "bar dol fen gri hal jor kel lum mor nel pra qui ros sel tor ulm ven wim yor zan".split()
_TAILS = "ada ben cor dil eth fin gan hol ira jun".split()
PEOPLE = "Anna Tom Maria Ben Lucy Peter Sarah David Emma Jack Nina Oscar".split()
COLORS = "red blue green yellow white black".split()
THINGS = "hat coat bike car bag cup chair lamp".split()
CITIES = "Paris London Berlin Rome Madrid Vienna Tokyo Moscow".split()
JOBS = "teacher doctor baker pilot farmer painter lawyer nurse".split()
ANIMALS = "dog cat horse rabbit parrot turtle".split()
FOODS = "soup bread rice cheese fish salad".split()
SECRETS = "apple river mountain window garden thunder silver castle".split()
WORDS = "stone river cloud table green seven paper light north horse music bread winter open glass".split()


def contexts() -> Iterator[Item]:
    """Two abilities: `copying` and `retrieval`."""
    yield from _repeated()
    yield from _patterns()
    yield from _made_up()
    for number in range(14):
        yield _owned(number)
    for number in range(14):
        yield _told(number)
    for number in range(12):
        yield _listed(number)
    for number in range(12):
        yield _asked(number)
    for number in range(len(SECRETS)):
        yield _secret(number)


def invented(number: int) -> str:
    """A name that nobody bears."""
    return (_HEADS[number % len(_HEADS)] + _TAILS[number // 2 % len(_TAILS)]).capitalize()


def _drawn(pool: Sequence[str], count: int, name: str) -> list[str]:
    return others(pool, "", count, name)


def _repeated() -> Iterator[Item]:
    for number in range(16):
        name = f"copying/sentence {number + 1}"
        words = _drawn(WORDS, 4 + number % 3, name)
        cut = len(words) - 1
        shown = " ".join(words)
        prompt = f"Copy: door house tree\nCopied: door house tree\nCopy: {shown}\nCopied: {' '.join(words[:cut])}"
        yield answer(name, prompt, [words[cut]])


def _patterns() -> Iterator[Item]:
    for number in range(16):
        name = f"copying/pattern {number + 1}"
        words = _drawn(WORDS, 2 + number % 3, name)
        run = (words * 5)[: 3 * len(words) + 1 + place(name) % len(words)]
        glue = (" ", ", ")[number % 2]
        yield answer(name, glue.join(run) + glue.rstrip(), [words[len(run) % len(words)]])


def _made_up() -> Iterator[Item]:
    for number in range(12):
        person, town = invented(3 * number + 1), invented(5 * number + 2)
        prompt = f"{person} comes from the town of {town}. Years later, {person} goes back to the town of"
        yield answer(f"copying/born {number + 1}", prompt, [town])
    for number in range(10):
        one, two, three = (invented(7 * number + step) for step in (0, 3, 6))
        codes = [str(place(f"code {number} {step}") % 90 + 10) for step in range(3)]
        asked = number % 3
        lines = [f"{who}: {code}" for who, code in zip((one, two, three), codes, strict=True)]
        prompt = "\n".join([*lines, f"{(one, two, three)[asked]}:"])
        yield answer(f"copying/code {number + 1}", prompt, [codes[asked]], match="numeric")


def _owned(number: int) -> Item:
    name = f"retrieval/owner {number + 1}"
    one, other = _drawn(PEOPLE, 2, name)
    mine, theirs = _drawn(COLORS, 2, name)
    thing = THINGS[number % len(THINGS)]
    asked, color = ((one, mine), (other, theirs))[number % 2]
    prompt = (
        f"{one} has a {mine} {thing}. {other} has a {theirs} {thing}.\n"
        f"Question: What color is {asked}'s {thing}?\nAnswer: {asked}'s {thing} is"
    )
    return answer(name, prompt, [color])


def _told(number: int) -> Item:
    name = f"retrieval/life {number + 1}"
    (who,), (city,), (job,) = (_drawn(pool, 1, name) for pool in (PEOPLE, CITIES, JOBS))
    (pet,), (food,) = (_drawn(pool, 1, name) for pool in (ANIMALS, FOODS))
    story = f"{who} lives in {city} and works as a {job}. {who} has a {pet} and likes to eat {food}."
    asked = (
        (f"Question: Where does {who} live?\nAnswer: {who} lives in", city),
        (f"Question: What is {who}'s job?\nAnswer: {who} works as a", job),
        (f"Question: What animal does {who} have?\nAnswer: {who} has a", pet),
        (f"Question: What does {who} like to eat?\nAnswer: {who} likes to eat", food),
    )
    question, right = asked[number % 4]
    return answer(name, f"{story}\n{question}", [right])


def _listed(number: int) -> Item:
    name = f"retrieval/price {number + 1}"
    goods = _drawn(FOODS, 3, name)
    prices = [1 + place(f"{name} {one}") % 9 + number % 3 for one in goods]
    for at in (1, 2):
        while prices[at] in prices[:at]:
            prices[at] += 1
    asked = number % 3
    menu = "\n".join(f"{what}: {price} dollars" for what, price in zip(goods, prices, strict=True))
    return answer(
        name,
        f"Menu\n{menu}\nQuestion: What does the {goods[asked]} cost?\nAnswer: The {goods[asked]} costs",
        [str(prices[asked])],
        match="numeric",
    )


def _asked(number: int) -> Item:
    name = f"retrieval/meeting {number + 1}"
    one, other, third = _drawn(PEOPLE, 3, name)
    places = _drawn(CITIES, 3, name)
    asked = number % 3
    who = (one, other, third)[asked]
    said = " ".join(f"{person} went to {city}." for person, city in zip((one, other, third), places, strict=True))
    return answer(name, f"{said}\nQuestion: Where did {who} go?\nAnswer: {who} went to", [places[asked]])


def _secret(number: int) -> Item:
    name = f"retrieval/password {number + 1}"
    secret = SECRETS[number]
    town = invented(11 * number + 4)
    prompt = (
        (
            f"The guard at the gate of {town} asks everyone for the password. The password is {secret}. It was "
            f'cold that evening. A traveler came, and the guard asked for it. The traveler said: "The password is'
        ),
        (
            f"Remember the secret word of {town}: it is {secret}. People there sell fish or wool, and the market "
            f"is held once a week. I remember: the secret word of {town} is"
        ),
    )[number % 2]
    return answer(name, prompt, [secret])
