"""Countries: capitals, continents, languages, currencies.

Left out of a column is what is not one plain thing: capitals that are moving or disputed, countries on two continents,
languages that share a country, currencies that change or bear two names.
"""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import answer, choice, listed, others, rows, turn
from stages.measures.items import Item

COUNTRIES = """
France | Paris | Europe | French | euro
Germany | Berlin | Europe | German | euro
Italy | Rome | Europe | Italian | euro
Spain | Madrid | Europe | Spanish | euro
Portugal | Lisbon | Europe | Portuguese | euro
Greece | Athens | Europe | Greek | euro
Austria | Vienna | Europe | German | euro
the Netherlands | Amsterdam | Europe | Dutch | euro
Belgium | Brussels | Europe | | euro
Ireland | Dublin | Europe | | euro
Finland | Helsinki | Europe | | euro
Poland | Warsaw | Europe | Polish | zloty
Hungary | Budapest | Europe | Hungarian | forint
the Czech Republic | Prague | Europe | | koruna
Sweden | Stockholm | Europe | Swedish | krona
Norway | Oslo | Europe | Norwegian | krone
Denmark | Copenhagen | Europe | Danish | krone
Iceland | Reykjavik/Reykjavík | Europe | Icelandic |
the United Kingdom | London | Europe | English | pound
Switzerland | | Europe | | franc
Romania | Bucharest | Europe | Romanian | leu
Bulgaria | Sofia | Europe | Bulgarian |
Croatia | Zagreb | Europe | Croatian |
Serbia | Belgrade | Europe | Serbian | dinar
Ukraine | Kyiv/Kiev | Europe | Ukrainian | hryvnia
Russia | Moscow | | Russian | ruble
Turkey | Ankara | | Turkish | lira
Slovakia | Bratislava | Europe | Slovak |
Slovenia | Ljubljana | Europe | Slovene/Slovenian |
Albania | Tirana | Europe | Albanian | lek
Estonia | Tallinn | Europe | Estonian |
Latvia | Riga | Europe | Latvian |
Lithuania | Vilnius | Europe | Lithuanian |
Egypt | Cairo | | Arabic | pound
Morocco | Rabat | Africa | | dirham
Algeria | Algiers | Africa | | dinar
Tunisia | Tunis | Africa | Arabic | dinar
Libya | Tripoli | Africa | Arabic | dinar
Kenya | Nairobi | Africa | | shilling
Nigeria | Abuja | Africa | | naira
Ghana | Accra | Africa | | cedi
Ethiopia | Addis Ababa | Africa | | birr
Senegal | Dakar | Africa | |
Uganda | Kampala | Africa | | shilling
Rwanda | Kigali | Africa | | franc
Angola | Luanda | Africa | Portuguese | kwanza
Mozambique | Maputo | Africa | | metical
Zambia | Lusaka | Africa | | kwacha
Zimbabwe | Harare | Africa | |
Madagascar | Antananarivo | Africa | | ariary
Somalia | Mogadishu | Africa | Somali |
Mali | Bamako | Africa | |
Japan | Tokyo | Asia | Japanese | yen
China | Beijing/Peking | Asia | Chinese/Mandarin | yuan
South Korea | Seoul | Asia | Korean | won
North Korea | Pyongyang | Asia | Korean | won
India | New Delhi | Asia | | rupee
Pakistan | Islamabad | Asia | | rupee
Bangladesh | Dhaka | Asia | Bengali/Bangla | taka
Nepal | Kathmandu | Asia | Nepali | rupee
Thailand | Bangkok | Asia | Thai | baht
Vietnam | Hanoi/Ha Noi | Asia | Vietnamese | dong
Cambodia | Phnom Penh | Asia | Khmer | riel
Laos | Vientiane | Asia | Lao | kip
Malaysia | Kuala Lumpur | Asia | Malay | ringgit
the Philippines | Manila | Asia | | peso
Mongolia | Ulaanbaatar/Ulan Bator | Asia | Mongolian | tugrik
Iran | Tehran/Teheran | Asia | Persian/Farsi | rial
Iraq | Baghdad | Asia | Arabic | dinar
Saudi Arabia | Riyadh | Asia | Arabic | riyal
Lebanon | Beirut | Asia | Arabic |
Syria | Damascus | Asia | Arabic |
Jordan | Amman | Asia | Arabic | dinar
Afghanistan | Kabul | Asia | | afghani
Uzbekistan | Tashkent | Asia | Uzbek |
Canada | Ottawa | North America | | dollar
the United States | Washington | North America | English | dollar
Mexico | Mexico City | North America | Spanish | peso
Cuba | Havana | North America | Spanish | peso
Jamaica | Kingston | North America | | dollar
Costa Rica | San José/San Jose | North America | Spanish |
Brazil | Brasília/Brasilia | South America | Portuguese | real
Argentina | Buenos Aires | South America | Spanish | peso
Chile | Santiago | South America | Spanish | peso
Peru | Lima | South America | Spanish | sol
Colombia | Bogotá/Bogota | South America | Spanish | peso
Venezuela | Caracas | South America | Spanish |
Ecuador | Quito | South America | Spanish |
Uruguay | Montevideo | South America | Spanish | peso
Australia | Canberra | | English | dollar
New Zealand | Wellington | | English | dollar
Fiji | Suva | | | dollar
"""
"""Country, capital, continent, the language that most people there speak, currency."""

CAPITALS = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "Q: What is the capital of {country}?\nA: The capital of {country} is",
    "{capital_of} and the capital of {country} is",
)
_BEFORE = (
    "The capital of Cyprus is Nicosia,",
    "The capital of Malta is Valletta,",
    "The capital of Armenia is Yerevan,",
)
CONTINENTS = ("{Country} is a country in", "The continent on which {country} lies is", "{Country} is located in")
LANGUAGES = (
    "The main language of {country} is",
    "In Israel most people speak Hebrew, and in {country} most people speak",
    "Country: Israel, language: Hebrew\nCountry: {country}, language:",
)
CURRENCIES = (
    "The currency of {country} is called the",
    "In {country}, people pay with money that is called the",
    "The money that is used in {country} is the",
)
_ALL_CONTINENTS = ("Africa", "Asia", "Europe", "North America", "South America")


def countries() -> Iterator[Item]:
    """Capitals both ways, and what else a table of countries says."""
    table = list(rows(COUNTRIES))
    money = [row[4] for row in table if row[4]]
    for number, (country, capital, continent, language, currency) in enumerate(table):
        if capital:
            yield _capital(country, listed(capital), back=number % 4 == 3)
        if continent:
            yield _continent(country, continent)
        if language:
            name = f"languages/{country}"
            prompt = turn(LANGUAGES, name).format(country=country)
            spoken = listed(language)
            yield answer(name, prompt, [*spoken, *(f"the {one} language" for one in spoken)])
        if currency:
            # Dollars are taken in many a country that has money of its own.
            yield _currency(country, currency, [one for one in money if one != "dollar" or continent == "Europe"])


def _capital(country: str, capitals: list[str], *, back: bool) -> Item:
    if back:
        bare = country.removeprefix("the ")
        return answer(
            f"capitals/of {capitals[0]}", f"{capitals[0]} is the capital of", list(dict.fromkeys([country, bare]))
        )
    name = f"capitals/{country}"
    before = turn(_BEFORE, country)
    return answer(name, turn(CAPITALS, name).format(country=country, capital_of=before), capitals)


def _continent(country: str, continent: str) -> Item:
    name = f"continents/{country}"
    prompt = turn(CONTINENTS, name).format(country=country, Country=country[0].upper() + country[1:])
    wrong = [f" {one}" for one in _ALL_CONTINENTS if one != continent]
    return choice(name, prompt, f" {continent}", wrong)


def _currency(country: str, currency: str, money: list[str]) -> Item:
    name = f"currencies/{country}"
    # Money of the same root elsewhere (krona, krone, koruna) says the same to many.
    far = [one for one in money if one[:2] != currency[:2]]
    wrong = [f" {one}" for one in others(far, currency, 3, name)]
    return choice(name, turn(CURRENCIES, name).format(country=country), f" {currency}", wrong)
