"""Months, days, feasts, and what time is measured in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stages.items.abilities.making import answer, choice, listed, others, rows, turn
from stages.measures.items import Item

# Written out: `calendar.month_name` speaks the language of the machine.
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = ("spring", "summer", "autumn", "winter")
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
LENGTHS = (31, None, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
"""Days of each month; February has no one number."""

AFTER = (
    "In the calendar, {before} is followed by {this}, and {this} is followed by",
    "{this} comes right after {before}, and the month right after {this} is",
    "The months in their order: {before}, {this},",
)
BEFORE = (
    "In the calendar, {after} comes right after {this}, and {this} comes right after",
    "The month right before {after} is {this}, and the month right before {this} is",
)
TOMORROW = (
    "Yesterday was {before}, today is {this}, and tomorrow will be",
    "The day after {before} is {this}, and the day after {this} is",
)
YESTERDAY = (
    "Tomorrow will be {after}, today is {this}, and yesterday was",
    "The day before {after} is {this}, and the day before {this} is",
)
FEASTS = """
christmas | Christmas Day is celebrated in the month of | December
halloween | Halloween is celebrated in the month of | October
valentine | Valentine's Day is celebrated in the month of | February
new year | New Year's Day is celebrated in the month of | January
independence | The United States celebrates Independence Day in the month of | July
bastille | France celebrates its national holiday, Bastille Day, in the month of | July
labour | In many countries, Labour Day is celebrated on the first day of the month of | May
thanksgiving | In the United States, Thanksgiving is celebrated in the month of | November
patrick | Saint Patrick's Day is celebrated in the month of | March
fools | All Fools' Day, a day for pranks, is the first day of the month of | April
women | International Women's Day is celebrated in the month of | March
shortest | The month with the fewest days is the month of | February
leap | In a leap year, one day is added to the month of | February
last | The last month of the year is the month of | December
"""
CLOCK = """
hours | A full day lasts 24 | hours | minutes / seconds / weeks
week | Monday to Sunday, seven days, make one | week | month / year / hour
weekend | Saturday and Sunday together are called the | weekend | workday / holiday / decade
decade | A period of ten years is called a | decade | century / week / month
century | A period of one hundred years is called a | century | decade / week / minute
millennium | A period of one thousand years is called a | millennium | century / decade / month
noon | Twelve o'clock in the middle of the day is called | noon | midnight / evening / dawn
midnight | Twelve o'clock in the middle of the night is called | midnight | noon / morning / dusk
leap year | A year with 366 days is called a | leap year | school year / light year / new year
months | A year has twelve | months | weeks / days / hours
weeks | A year has about fifty-two | weeks | months / days / hours
breakfast | The meal that people eat in the morning is called | breakfast | dinner / supper / dessert
sunset | In the evening, when the sun goes down, there is a | sunset | sunrise / noon / eclipse
sunrise | In the morning, when the sun comes up, there is a | sunrise | sunset / midnight / rainbow
"""


def calendar_items() -> Iterator[Item]:
    """Orders of months, days and seasons; lengths of months; feasts with a date that does not move."""
    yield from _months()
    yield from _days()
    for number, season in enumerate(SEASONS[:3]):
        name = f"calendar/season after {season}"
        wrong = [f" {one}" for one in SEASONS if one not in (season, SEASONS[number + 1])]
        yield choice(name, f"The season that comes after {season} is", f" {SEASONS[number + 1]}", wrong)
    for key, prompt, month in rows(FEASTS):
        yield _one_of(f"calendar/{key}", prompt, month, MONTHS)
    for key, prompt, right, false in rows(CLOCK):
        yield choice(f"calendar/{key}", prompt, f" {right}", [f" {one}" for one in listed(false)])


def _months() -> Iterator[Item]:
    for number, month in enumerate(MONTHS):
        name = f"calendar/month after {month}"
        yield answer(name, _around(turn(AFTER, name), MONTHS, number), [MONTHS[(number + 1) % 12]])
        name = f"calendar/month before {month}"
        yield _one_of(name, _around(turn(BEFORE, name), MONTHS, number), MONTHS[number - 1], MONTHS)
        wrong = [f" {MONTHS[(number + step) % 12]}" for step in (1, 5, 8)]
        prompt = f"The {ORDINALS[number]} month of the year is"
        yield choice(f"calendar/month number {number + 1}", prompt, f" {month}", wrong)
        if (length := LENGTHS[number]) is not None:
            lengths = [f" {one}" for one in (28, 30, 31, 40) if one != length]
            yield choice(f"calendar/days of {month}", f"The number of days in {month} is", f" {length}", lengths)


def _days() -> Iterator[Item]:
    for number, day in enumerate(DAYS):
        name = f"calendar/day after {day}"
        yield answer(name, _around(turn(TOMORROW, name), DAYS, number), [DAYS[(number + 1) % 7]])
        name = f"calendar/day before {day}"
        yield _one_of(name, _around(turn(YESTERDAY, name), DAYS, number), DAYS[number - 1], DAYS)


def _one_of(name: str, prompt: str, right: str, names: Sequence[str]) -> Item:
    return choice(name, prompt, f" {right}", [f" {one}" for one in others(names, right, 3, name)])


def _around(told: str, names: Sequence[str], number: int) -> str:
    """A wording with a name and its neighbour on the side that is not asked for."""
    after = names[(number + 1) % len(names)]
    return told.format(before=names[number - 1], this=names[number], after=after)
