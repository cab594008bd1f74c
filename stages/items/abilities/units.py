"""What is measured in what, by what, and how many make one."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import answer, apart, choice, listed, others, rows, turn
from stages.measures.items import Item

PARTS = """
second | minute | 60
minute | hour | 60
hour | day | 24
day | week | 7
month | year | 12
year | decade | 10
year | century | 100
year | millennium | 1000
millimeter | centimeter | 10
centimeter | meter | 100
meter | kilometer | 1000
gram | kilogram | 1000
milliliter | liter | 1000
kilogram | metric ton | 1000
inch | foot | 12
foot | yard | 3
ounce | pound | 16
cent | dollar | 100
degree | full circle | 360
degree | right angle | 90
bit | byte | 8
milligram | gram | 1000
second | hour | 3600
"""
"""How many of the first make one of the second."""
HOW_MANY = (
    "The number of {0}s in one {1} is",
    "Question: How many {0}s are there in one {1}?\nAnswer:",
    "One {1} is the same as this many {0}s:",
)
_PLURALS = {"inch": "inches", "foot": "feet", "century": "centuries"}

MEASURES = """
length | The meter is a unit of | length | time / weight / temperature
time | The second is a unit of | time | length / mass / color
mass | The kilogram is a unit of | mass | time / speed / light
temperature | The degree Celsius is a unit of | temperature | length / time / money
power | The watt is a unit of | power | length / time / volume
force | The newton is a unit of | force | time / length / temperature
energy | The joule is a unit of | energy | length / time / color
current | The ampere is a unit of electric | current | distance / color / weight
voltage | The volt is a unit of electric | potential | length / color / age
frequency | The hertz is a unit of | frequency | weight / length / color
volume | The liter is a unit of | volume | time / speed / age
pressure | The pascal is a unit of | pressure | time / length / money
resistance | The ohm is a unit of electrical | resistance | distance / age / taste
speed | Kilometers per hour measure | speed | weight / color / volume
distance | A light-year is a unit of | distance | brightness / weight / heat
area | The square meter is a unit of | area | time / weight / heat
memory | The gigabyte is a unit of | memory | length / heat / taste
angle | Besides temperature, degrees are used to measure | angles | weights / prices / sounds
"""
TOOLS = """
thermometer | Temperature is measured with a | thermometer | telescope / hammer / compass
scale | To find out how much something weighs, we put it on a | scale | shelf / wall / map
ruler | The length of a line on paper is measured with a | ruler | clock / spoon / scale
clock | The time of day is shown by a | clock | ruler / thermometer / compass
compass | Which direction is north is shown by a | compass | clock / barometer / ruler
barometer | Air pressure is measured with a | barometer | ruler / hammer / clock
speedometer | In a car, how fast it goes is shown by the | speedometer | mirror / radio / wheel
stopwatch | The time that a runner needs is measured with a | stopwatch | ruler / scale / compass
calendar | The days of the year are listed in a | calendar | dictionary / barometer / recipe
telescope | Astronomers look at distant stars through a | telescope | microscope / hammer / stethoscope
microscope | Tiny things such as bacteria are seen through a | microscope | telescope / periscope / window
stethoscope | A doctor listens to the heart with a | stethoscope | telescope / hammer / ladder
"""
SYMBOLS = """
km | kilometer/kilometre
cm | centimeter/centimetre
mm | millimeter/millimetre
kg | kilogram
mg | milligram
ml | milliliter/millilitre
Hz | hertz
kW | kilowatt
lb | pound
oz | ounce
GB | gigabyte
"""
STANDS_FOR = ("As a unit of measure, {0} stands for", "In measurements, {0} is short for")
PREFIXES = """
kilo | one thousand
mega | one million
giga | one billion
centi | one hundredth
milli | one thousandth
micro | one millionth
"""


def units() -> Iterator[Item]:
    """How many make one, what is measured in a unit, by which tool, and what units are called."""
    counts = sorted({int(row[2]) for row in rows(PARTS)})
    for small, big, many in rows(PARTS):
        name = f"units/{small} in {big}"
        prompt = turn(HOW_MANY, name).replace("{0}s", _PLURALS.get(small, f"{small}s")).format(small, big)
        near = sorted(counts, key=lambda one: (abs(counts.index(one) - counts.index(int(many))), one))
        yield choice(name, prompt, f" {many}", apart(f" {many}", (f" {one}" for one in near), 3))
    for table in (MEASURES, TOOLS):
        for key, prompt, right, wrong in rows(table):
            yield choice(f"units/{key}", prompt, f" {right}", [f" {one}" for one in listed(wrong)])
    for symbol, names in rows(SYMBOLS):
        name = f"units/symbol {symbol}"
        yield answer(
            name,
            turn(STANDS_FOR, name).format(symbol),
            [*listed(names), *(f"{one}s" for one in listed(names) if one != "hertz")],
        )
    meanings = [row[1] for row in rows(PREFIXES)]
    for prefix, meaning in rows(PREFIXES):
        name = f"units/prefix {prefix}"
        false = apart(f" {meaning}", (f" {one}" for one in others(meanings, meaning, len(meanings), name)), 3)
        yield choice(name, f"In the metric system, the prefix {prefix} means", f" {meaning}", false)
