"""How words belong together: plurals, past tenses, degrees, young animals, pairs, trades and their tools."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import answer, choice, listed, rows, turn
from stages.measures.items import Item

PLURALS = """
child | children
man | men
woman | women
foot | feet
tooth | teeth
mouse | mice
goose | geese
ox | oxen
leaf | leaves
knife | knives
wife | wives
wolf | wolves
shelf | shelves
city | cities
baby | babies
party | parties
box | boxes
bus | buses/busses
church | churches
potato | potatoes
tomato | tomatoes
hero | heroes
crisis | crises
analysis | analyses
sheep | sheep
person | people/persons
key | keys
boy | boys
"""
PASTS = """
go | went
see | saw
eat | ate
take | took
give | gave
write | wrote
run | ran
come | came
buy | bought
think | thought
bring | brought
catch | caught
teach | taught
sleep | slept
keep | kept
know | knew
fly | flew
swim | swam
sing | sang
drink | drank
begin | began
break | broke
speak | spoke
drive | drove
make | made
find | found
lose | lost
pay | paid
stand | stood
sell | sold
walk | walked
stop | stopped
try | tried
"""
DEGREES = """
small | smaller | smallest
good | better | best
bad | worse | worst
happy | happier | happiest
hot | hotter | hottest
strong | stronger | strongest
easy | easier | easiest
thin | thinner | thinnest
nice | nicer | nicest
far | farther/further | farthest/furthest
"""
YOUNG = """
dog | puppy | kitten / calf / chick
cat | kitten | puppy / lamb / cub
cow | calf | foal / kitten / lamb
horse | foal | calf / puppy / chick
sheep | lamb | kid / calf / puppy
hen | chick | foal / kitten / calf
duck | duckling | puppy / lamb / foal
lion | cub | foal / calf / chick
bear | cub | lamb / kitten / foal
pig | piglet | puppy / chick / foal
goat | kid | cub / chick / puppy
goose | gosling | kitten / calf / cub
frog | tadpole | puppy / lamb / foal
deer | fawn | kitten / chick / piglet
kangaroo | joey | puppy / chick / lamb
swan | cygnet | kitten / foal / cub
"""
PAIRS = """
king | queen
father | mother
brother | sister
uncle | aunt
son | daughter
prince | princess
actor | actress
husband | wife
boy | girl
grandfather | grandmother
nephew | niece
waiter | waitress
"""
TOOLS = """
carpenter | hammer and nails | needle and thread / pots and pans / chalk and board
tailor | needle and thread | hammer and nails / plow and tractor / drum and trumpet
painter | brush and paint | saw and nails / flour and sugar / net and boat
teacher | chalk and blackboard | hammer and anvil / net and bait / plow and tractor
fisherman | net and boat | needle and thread / chalk and board / brush and paint
farmer | plow and tractor | needle and thread / bow and violin / scissors and comb
hairdresser | scissors and comb | plow and tractor / net and boat / hammer and anvil
cook | pots and pans | hammer and nails / telescope and map / brush and easel
blacksmith | hammer and anvil | scissors and comb / pen and paper / pots and pans
writer | pen and paper | hammer and anvil / net and boat / plow and tractor
"""
PLACES = """
doctor | hospital | kitchen / farm / court
judge | court | hospital / bakery / farm
baker | bakery | court / library / airport
librarian | library | kitchen / garage / farm
waiter | restaurant | library / court / mine
miner | mine | bakery / hotel / library
pilot | plane | kitchen / tunnel / garden
sailor | ship | bakery / library / court
mechanic | garage | library / kitchen / church
priest | church | garage / bakery / mine
"""

KINDS = """
rose | flower | tool / bird / vehicle
hammer | tool | fruit / animal / color
apple | fruit | tool / vehicle / insect
sparrow | bird | fish / fruit / tool
salmon | fish | bird / tree / color
oak | tree | fish / color / tool
violin | musical instrument | kitchen tool / wild animal / bright color
truck | vehicle | fruit / bird / color
carrot | vegetable | vehicle / bird / metal
copper | metal | bird / fruit / vehicle
ruby | gemstone | vehicle / vegetable / insect
butterfly | insect | fish / metal / tree
chair | furniture | music / fruit / metal
shirt | clothing | animal / metal / insect
tennis | sport | metal / fruit / language
purple | color | sport / bird / metal
rabbit | mammal | reptile / metal / vegetable
crocodile | reptile | mammal / vegetable / tool
"""

MANY = (
    "one dog, two dogs; one house, two houses; one {0}, two",
    "Singular: dog, plural: dogs\nSingular: house, plural: houses\nSingular: {0}, plural:",
)
YESTERDAY = (
    "Today I work. Yesterday I worked. Today I feel. Yesterday I felt. Today I {0}. Yesterday I",
    "Present: work, past: worked\nPresent: feel, past: felt\nPresent: {0}, past:",
    "The past tense of feel is felt. The past tense of {0} is",
)
SORTS = ('The word "{0}" names a kind of', "{1} is the name of a kind of")
BABY = ("A baby {0} is called a", "The young of a {0} is called a")
HERS = ("man and woman, bull and cow, {0} and", "A bull is to a cow as {1} is to {2}")


def relations() -> Iterator[Item]:
    """Forms are told, after an example; animals, trades and places are chosen."""
    for one, many in rows(PLURALS):
        name = f"word forms/plural of {one}"
        yield answer(name, turn(MANY, name).format(one), listed(many))
    for now, past in rows(PASTS):
        name = f"word forms/past of {now}"
        yield answer(name, turn(YESTERDAY, name).format(now), listed(past))
    for plain, more, most in rows(DEGREES):
        prompt = f"tall, taller, tallest; old, older, oldest; {plain}, {listed(more)[0]},"
        yield answer(f"word forms/most {plain}", prompt, listed(most))
    for he, she in rows(PAIRS):
        name = f"word relations/{he}"
        yield answer(name, turn(HERS, name).format(he, f"{_article(he)} {he}", _article(she)), [she])
    for animal, young, wrong in rows(YOUNG):
        name = f"word relations/young of {animal}"
        yield choice(name, turn(BABY, name).format(animal), f" {young}", [f" {one}" for one in listed(wrong)])
    for trade, tools, wrong in rows(TOOLS):
        prompt = f"The tools that a {trade} works with are"
        yield choice(f"word relations/tools of {trade}", prompt, f" {tools}", [f" {one}" for one in listed(wrong)])
    for trade, where, wrong in rows(PLACES):
        prompt = f"The place where a {trade} works is a"
        yield choice(f"word relations/place of {trade}", prompt, f" {where}", [f" {one}" for one in listed(wrong)])
    for word, kind, wrong in rows(KINDS):
        name = f"word relations/kind of {word}"
        prompt = turn(SORTS, name).format(word, word.capitalize())
        yield choice(name, prompt, f" {kind}", [f" {one}" for one in listed(wrong)])


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
