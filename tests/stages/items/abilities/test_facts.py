"""What the tables say, held against others: pytz and tzdata, pendulum, humanize, calendar, scipy, Python itself."""

from __future__ import annotations

import ast
import calendar
import importlib
import operator
import re
import unicodedata
from datetime import date, timedelta
from itertools import pairwise

import humanize
import pytest
import pytz
from scipy import constants

from stages.items.abilities import (
    calendars,
    chinese,
    code,
    contexts,
    elements,
    geography,
    numbers,
    relations,
    translation,
    units,
)
from stages.items.abilities.making import listed, rows
from stages.items.abilities.shipped import shipped
from stages.measures.items import Item

EVERY = {item.id: item for items in shipped().values() for item in items}
CODES = {name: code for code, name in pytz.country_names.items()} | {
    "the United Kingdom": "GB",
    "the Netherlands": "NL",
    "the Czech Republic": "CZ",
    "the Philippines": "PH",
    "the United States": "US",
    "South Korea": "KR",
    "North Korea": "KP",
}
AREAS = {"Europe": "Europe", "Asia": "Asia", "Africa": "Africa", "North America": "America", "South America": "America"}
ISLANDS = {"Iceland": "Europe", "Madagascar": "Africa"}
"""Countries whose time zones are named after an ocean."""


def of(ability: str, task: str) -> list[Item]:
    return [item for item in EVERY.values() if item.ability == ability and item.task == task]


def right(item: Item) -> str:
    return item.choices[item.right].strip() if item.choices else item.answers[0]


def zones(country: str) -> list[str]:
    return list(pytz.country_timezones[CODES[country]])


def test_countries_lie_on_the_continents_of_their_time_zones():
    checked = 0
    for country, _, continent, _, _ in rows(geography.COUNTRIES):
        areas = {zone.split("/")[0] for zone in zones(country)} & {*AREAS.values()}
        if continent and country not in ISLANDS:
            assert AREAS[continent] in areas, country
            checked += 1
        if areas >= {"Europe", "Asia"}:
            assert not continent, f"{country} lies on two continents"
    assert checked > 75
    assert {
        country: ISLANDS[country] for country, _, continent, *_ in rows(geography.COUNTRIES) if country in ISLANDS
    } == ISLANDS


def test_american_countries_lie_north_or_south_as_their_capitals_do():
    """tzdata has the latitude of each zone: Panama and what is north of it is North America."""
    north = {country for country, _, continent, *_ in rows(geography.COUNTRIES) if continent == "North America"}
    south = {country for country, _, continent, *_ in rows(geography.COUNTRIES) if continent == "South America"}
    assert min(map(latitude, north)) > 9 > max(map(latitude, south - {"Colombia", "Venezuela"}))


def latitude(country: str) -> float:
    table = importlib.resources.files("tzdata").joinpath("zoneinfo/zone.tab").read_text(encoding="utf-8")
    at = re.search(rf"^{CODES[country]}\t([+-]\d\d)(\d\d)", table, re.MULTILINE)
    assert at
    return float(at[1]) + float(at[2]) / 60


def test_capitals_are_the_cities_of_time_zones_where_a_country_has_one_alone():
    agreed = 0
    for country, capital, *_ in rows(geography.COUNTRIES):
        if not capital:
            continue
        cities = {plain(zone.rsplit("/", 1)[1].replace("_", " ")) for zone in zones(country)}
        agreed += bool(cities & {plain(one) for one in listed(capital)})
    assert agreed >= 60


def plain(text: str) -> str:
    kept = [one for one in unicodedata.normalize("NFD", text) if not unicodedata.combining(one)]
    return "".join(kept).casefold()


def test_no_two_countries_share_a_capital_and_items_ask_both_ways():
    capitals = [capital for _, capital, *_ in rows(geography.COUNTRIES) if capital]
    assert len({*capitals}) == len(capitals)
    assert right(EVERY["capitals/france"]) == "Paris" and EVERY["capitals/france"].prompt.endswith(" of France is")
    back = [item for item in of("capitals", "answers") if item.id.startswith("capitals/of-")]
    known = {listed(capital)[0]: country for country, capital, *_ in rows(geography.COUNTRIES) if capital}
    assert len(back) > 15
    # London is the capital of England, too.
    assert not {"London"} & {item.prompt.split(" is ")[0] for item in back}
    for item in back:
        assert item.answers[0] == known[item.prompt.removesuffix(" is the capital of")]


def test_elements_stand_where_closed_shells_and_columns_put_them():
    """Noble gases end the shells 2, 8, 8, 18, 18, 32; before them stand halogens, after them alkali metals."""
    table = elements.table()
    noble, total = [], 0
    for shell in (2, 8, 8, 18, 18, 32):
        total += shell
        noble.append(total)
    assert [table[number][0] for number in noble] == ["He", "Ne", "Ar", "Kr", "Xe", "Rn"]
    assert [table[number + 1][0] for number in noble[:5]] == ["Li", "Na", "K", "Rb", "Cs"]
    assert [table[number + 2][0] for number in noble[:5]] == ["Be", "Mg", "Ca", "Sr", "Ba"]
    assert [table[number - 1][0] for number in noble[1:5]] == ["F", "Cl", "Br", "I"]
    assert [table[number - 2][0] for number in noble[1:5]] == ["O", "S", "Se", "Te"]
    assert len({symbol for symbol, _ in table.values()}) == len(table)


def test_symbols_are_spelt_from_the_letters_of_names_but_for_the_latin_ones():
    latin = {symbol for symbol, names in elements.table().values() if not in_order(symbol.lower(), names[0])}
    assert latin == {"Na", "K", "Fe", "Cu", "Ag", "Sn", "Sb", "W", "Au", "Hg", "Pb"}
    assert all(symbol[0].lower() == names[0][0] for symbol, names in elements.table().values() if symbol not in latin)


def in_order(letters: str, word: str) -> bool:
    left = iter(word)
    return all(letter in left for letter in letters)


def test_element_items_say_what_the_table_says():
    by_name = {names[0]: (number, symbol) for number, (symbol, names) in elements.table().items()}
    for item in of("elements", "choices"):
        kind, _, name = item.id.removeprefix("elements/").partition("-of-")
        if kind == "name":
            assert by_name[right(item)][1].lower() == name and f" {by_name[right(item)][1]}" in item.prompt
            continue
        assert right(item) == str(by_name[name][("number", "symbol").index(kind)])
        assert name in item.prompt


def test_months_days_and_lengths_are_those_of_a_calendar(monkeypatch):
    english = [date(2024, month, 1).strftime("%B") for month in range(1, 13)]
    assert english == calendars.MONTHS
    assert [(date(2024, 1, 1) + timedelta(day)).strftime("%A") for day in range(7)] == calendars.DAYS
    lengths = [{calendar.monthrange(year, month)[1] for year in range(1999, 2005)} for month in range(1, 13)]
    assert [length.pop() if len(length) == 1 else None for length in lengths] == [*calendars.LENGTHS]


def test_neighbours_in_the_calendar_are_found_by_counting_days():
    checked = 0
    for item in [*of("calendar", "answers"), *of("calendar", "choices")]:
        if found := re.fullmatch(r"calendar/(month|day)-(after|before)-(\w+)", item.id):
            unit, way, name = found.groups()
            names = (calendars.MONTHS, calendars.DAYS)[unit == "day"]
            at = [one.lower() for one in names].index(name)
            begin = date(2024, at + 1, 15) if unit == "month" else date(2024, 1, 1) + timedelta(at)
            moved = begin + timedelta((31 if unit == "month" else 1) * (1 if way == "after" else -1))
            back = begin - timedelta((31 if unit == "month" else 1) * (1 if way == "after" else -1))
            assert back.strftime("%B" if unit == "month" else "%A") in item.prompt
            checked += 1
            assert right(item) == moved.strftime("%B" if unit == "month" else "%A")
            assert names[at] in item.prompt
    assert checked == 2 * (12 + 7)


UNITS = {
    ("second", "minute"): constants.minute,
    ("second", "hour"): constants.hour,
    ("minute", "hour"): constants.hour / constants.minute,
    ("hour", "day"): constants.day / constants.hour,
    ("day", "week"): constants.week / constants.day,
    ("millimeter", "centimeter"): constants.centi / constants.milli,
    ("centimeter", "meter"): 1 / constants.centi,
    ("meter", "kilometer"): constants.kilo,
    ("gram", "kilogram"): 1 / constants.gram,
    ("milliliter", "liter"): 1 / constants.milli,
    ("kilogram", "metric ton"): constants.metric_ton,
    ("inch", "foot"): constants.foot / constants.inch,
    ("foot", "yard"): constants.yard / constants.foot,
    ("ounce", "pound"): constants.pound / constants.ounce,
    ("degree", "full circle"): 2 * constants.pi / constants.degree,
    ("degree", "right angle"): constants.pi / 2 / constants.degree,
    ("milligram", "gram"): 1 / constants.milli,
}


def test_how_many_make_one_is_what_scipy_computes():
    table = {(small, big): int(many) for small, big, many in rows(units.PARTS)}
    assert table.keys() >= UNITS.keys()
    for pair, expected in UNITS.items():
        assert table[pair] == pytest.approx(expected, rel=1e-9)
    prefixes = {"one thousand": constants.kilo, "one million": constants.mega, "one billion": constants.giga}
    prefixes |= {"one hundredth": constants.centi, "one thousandth": constants.milli, "one millionth": constants.micro}
    assert {p: prefixes[said] for p, said in rows(units.PREFIXES)} == {
        p: getattr(constants, p) for p, _ in rows(units.PREFIXES)
    }


def test_arithmetic_is_computed_again_from_what_the_prompts_say():
    words = {"plus": "+", "minus": "-", "times": "*", "divided by": "/", "x": "*"}
    signs = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    told = {"apples": "+", "birds": "-", "coins": "+", "cakes": "-", "boxes": "*"}
    checked = 0
    for item in EVERY.values():
        if item.ability != "arithmetic":
            continue
        last = item.prompt.splitlines()[-1].removesuffix(" =")
        found = re.search(
            r"(\d+) (plus|minus|times|divided by|[-+x/]) (\d+)", last if "=" in item.prompt else item.prompt
        )
        if found:
            sign = words.get(found[2], found[2])
            value = signs[sign](int(found[1]), int(found[3]))
        else:
            one, other = map(int, re.findall(r"\d+", item.prompt))
            value = signs[told[item.id.split("/")[1].split("-")[0]]](one, other)
        assert float(right(item)) == value, item.id
        checked += 1
    assert checked == len(numbers.EASY) + len(numbers.HARD) + 20


def test_counts_go_on_by_equal_steps_and_things_are_as_many_as_said():
    for item in of("counting", "answers"):
        if item.match == "numeric":
            shown = [int(one) for one in re.findall(r"\d+", item.prompt)]
            assert {b - a for a, b in zip(shown, [*shown[1:], int(item.answers[0])], strict=True)} == {
                shown[1] - shown[0]
            }
        elif "words" in item.id:
            said = item.prompt.split(": ")[1].rstrip(",").split(", ")
            places = [numbers.COUNTED.index(one) for one in [*said, right(item)]]
            assert {b - a for a, b in pairwise(places)} in ({1}, {-1})
    for number, word in enumerate(numbers.COUNTED[:10]):
        humanize.i18n.deactivate()
        assert humanize.apnumber(number) == word
    for item in of("counting", "choices"):
        said = numbers.COUNTED.index(right(item).split()[0])
        if "list" in item.id:
            assert item.prompt.split(".")[0].count(",") + 1 == said
        else:
            thing = item.id.rsplit("-", 1)[1]
            line = item.prompt.splitlines()[0] if "\n" in item.prompt else item.prompt.rsplit(".", 1)[1]
            assert line.split().count(thing) + line.split().count(f"{thing}:") == said


def test_expressions_give_in_python_what_is_said_and_nothing_else():
    for expression, said, wrong in code.EXPRESSIONS:
        assert repr(eval(expression)) == said
        assert said not in wrong
    assert len(of("code", "choices")) == len(code.EXPRESSIONS) + len(code.CHOSEN)


def test_code_goes_on_to_programs_that_parse():
    for _, prompt, accepted in code.TOLD:
        for one in accepted.split("/"):
            ast.parse(closed(f"{prompt} {one}" if not prompt.endswith(".") else f"{prompt}{one}(1)"))
    for _, prompt, said, _ in code.CHOSEN:
        ast.parse(closed(prompt + said))


def closed(text: str) -> str:
    """A beginning of a program with what is open closed."""
    for left, shut in ("()", "[]", "{}"):
        text += shut * (text.count(left) - text.count(shut))
    if text.lstrip().startswith("try:"):
        return f"{text}\n    pass"
    return (
        f"{text}:\n    pass"
        if re.match(r"(for|if) ", text.splitlines()[-1]) and not text.endswith(":")
        else (f"{text}\n    pass" if text.endswith(":") else text)
    )


def test_copies_and_facts_of_a_context_stand_in_it():
    for ability in ("copying", "retrieval"):
        for item in of(ability, "answers"):
            assert item.answers[0] in item.prompt, item.id
    assert len({contexts.invented(number) for number in range(20)}) == 20


def test_words_of_months_days_and_numbers_are_those_of_pendulum_and_humanize():
    table = {row[0]: row[1:] for row in rows(translation.WORDS)}
    for column, (locale, spoken) in enumerate((("fr", "fr_FR"), ("es", "es_ES"), ("de", "de_DE"), ("zh", "zh_CN"))):
        said = importlib.import_module(f"pendulum.locales.{locale}.locale").locale["translations"]
        for number, day in ((0, "Monday"), (4, "Friday")):
            assert table[day][column] == said["days"]["wide"][number]
        assert table["January"][column] == said["months"]["wide"][1]
        humanize.i18n.activate(spoken)
        for number, word in ((1, "one"), (2, "two"), (3, "three"), (7, "seven")):
            assert table[word][column] == humanize.apnumber(number)
        humanize.i18n.deactivate()


def test_translations_are_whole_and_in_the_letters_of_their_language():
    for word, *four in rows(translation.WORDS):
        assert len(four) == 4 and all(four), word
        assert all(unicodedata.name(sign).startswith("CJK") for sign in four[3]), word
        assert not any(unicodedata.name(sign).startswith("CJK") for one in four[:3] for sign in one), word
        # A noun of German is written with a capital; numbers, colors and words of thanks are not.
        assert four[2][0].isupper() == (word[0].isupper() or word in NOUNS), word


NOUNS = (
    "house water book dog cat horse fish bread milk apple tree flower sun moon mountain fire night friend mother "
    "father school door hand eye heart"
).split()


def test_chinese_numbers_and_calendar_are_right():
    digits = {text: unicodedata.numeric(text) for text in "一二三四五六七八九十"}
    for prompt, said, _ in rows(chinese.FACTS):
        if found := re.fullmatch(r"(.)(加|乘以|减去)(.)等于", prompt):
            one, sign, other = found.groups()
            value = {"加": operator.add, "乘以": operator.mul, "减去": operator.sub}[sign](digits[one], digits[other])
            assert digits[said] == value
        elif found := re.fullmatch(r"星期(.)的后一天是", prompt):
            assert digits[said[-1]] == digits[found[1]] + 1
        elif found := re.fullmatch(r"(.)月的下一个月是", prompt):
            assert digits[said[0]] == digits[found[1]] + 1


def test_chinese_items_are_in_han_characters_and_differ_in_more_than_their_length():
    for item in EVERY.values():
        if item.ability.startswith("chinese"):
            assert item.language == "zh"
            assert any(unicodedata.name(sign, "").startswith("CJK") for sign in item.prompt)


def test_plurals_pasts_and_degrees_that_are_regular_follow_the_rule():
    for one, many in rows(relations.PLURALS):
        if many == f"{one}s":
            assert not one.endswith(("s", "x", "ch", "sh")) and not re.search(r"[^aeiou]y$", one)
        if one.endswith(("x", "ch")) and one != "ox":
            assert many == f"{one}es"
        if re.search(r"[^aeiou]y$", one):
            assert many == f"{one[:-1]}ies"
    for _, more, most in rows(relations.DEGREES):
        for comparative, superlative in zip(listed(more), listed(most), strict=True):
            if comparative.endswith("er") and comparative != "better":
                assert superlative == f"{comparative[:-2]}est"
