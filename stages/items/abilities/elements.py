"""Chemical elements: symbols, names, atomic numbers."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import apart, choice, listed, place, turn
from stages.measures.items import Item

ELEMENTS = """
H hydrogen, He helium, Li lithium, Be beryllium, B boron, C carbon, N nitrogen, O oxygen, F fluorine, Ne neon,
Na sodium, Mg magnesium, Al aluminum/aluminium, Si silicon, P phosphorus, S sulfur/sulphur, Cl chlorine, Ar argon,
K potassium, Ca calcium, Sc scandium, Ti titanium, V vanadium, Cr chromium, Mn manganese, Fe iron, Co cobalt, Ni nickel,
Cu copper, Zn zinc, Ga gallium, Ge germanium, As arsenic, Se selenium, Br bromine, Kr krypton,
Rb rubidium, Sr strontium, Y yttrium, Zr zirconium, Nb niobium, Mo molybdenum, Tc technetium, Ru ruthenium, Rh rhodium,
Pd palladium, Ag silver, Cd cadmium, In indium, Sn tin, Sb antimony, Te tellurium, I iodine, Xe xenon,
Cs cesium/caesium, Ba barium
"""
"""The first 56 in order of their atomic numbers."""
LATER = {
    74: "W tungsten",
    78: "Pt platinum",
    79: "Au gold",
    80: "Hg mercury",
    82: "Pb lead",
    86: "Rn radon",
    88: "Ra radium",
    92: "U uranium",
    94: "Pu plutonium",
}
"""Others that many know, by their atomic number."""

SYMBOLS = (
    "The chemical symbol for helium is He. The chemical symbol for {name} is",
    "Element: uranium, symbol: U\nElement: {name}, symbol:",
    "In the periodic table, the symbol of the element {name} is",
)
NAMES = (
    "In chemistry, {symbol} is the symbol for the element",
    "Symbol: Rn, element: radon\nSymbol: {symbol}, element:",
    "The chemical symbol {symbol} stands for",
)
NUMBERS = (
    "The atomic number of {name} is",
    "In the periodic table, {name} has the atomic number",
)


def table() -> dict[int, tuple[str, list[str]]]:
    """Atomic number -> symbol, and the names that it bears."""
    found = dict(enumerate((one.strip() for one in ELEMENTS.replace("\n", " ").split(",")), 1)) | LATER
    return {number: (text.split(" ", 1)[0], listed(text.split(" ", 1)[1])) for number, text in found.items()}


def elements() -> Iterator[Item]:
    """Symbol of a name, name of a symbol, and the numbers of the lighter half."""
    every = table()
    symbols = [symbol for symbol, _ in every.values()]
    called = [names[0] for _, names in every.values()]
    for number, (symbol, names) in every.items():
        if names[0] not in ("helium", "uranium", "radon"):
            yield _symbol(symbol, names[0], symbols) if number % 2 else _name(symbol, names, called)
        if number <= 36 or number >= 74:
            name = f"elements/number of {names[0]}"
            off = 1 + place(name) % 3
            near = (number + off, number - off, number + 10, number + 4, number + 7)
            wrong = apart(f" {number}", (f" {one}" for one in near if one > 0), 3)
            yield choice(name, turn(NUMBERS, name).format(name=names[0]), f" {number}", wrong)


def _symbol(symbol: str, element: str, symbols: list[str]) -> Item:
    name = f"elements/symbol of {element}"
    # What a guess by the first letters would choose comes first.
    like = sorted(
        (one for one in symbols if one != symbol),
        key=lambda one: (one[0] != symbol[0], place(f"{name} {one}")),
    )
    return choice(
        name,
        turn(SYMBOLS, name).format(name=element),
        f" {symbol}",
        apart(f" {symbol}", (f" {one}" for one in like), 3),
    )


def _name(symbol: str, names: list[str], every: list[str]) -> Item:
    name = f"elements/name of {symbol}"
    like = sorted(
        (one for one in every if one != names[0]),
        key=lambda one: (one[0] != names[0][0], place(f"{name} {one}")),
    )
    return choice(
        name,
        turn(NAMES, name).format(symbol=symbol),
        f" {names[0]}",
        apart(f" {names[0]}", (f" {one}" for one in like), 3),
    )
