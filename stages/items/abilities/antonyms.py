"""Opposites."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import answer, choice, listed, place, rows, turn
from stages.measures.items import Item

RIGID = """
hot | cold
up | down
left | right
day | night
black | white
open | closed/close/shut
yes | no
true | false
north | south
west | east
good | bad/evil
male | female
alive | dead
before | after
inside | outside
above | below/beneath/under
first | last
push | pull
buy | sell
win | lose
always | never
summer | winter
early | late
full | empty
wet | dry
love | hate
life | death
war | peace
question | answer
entrance | exit
begin | end/finish/stop
success | failure
positive | negative
maximum | minimum
"""
"""Pairs of which the second is what comes to nearly everybody; what else is right is listed."""
CHOSEN = """
big | small | huge / round / red
fast | slow | quick / tall / green
young | old | small / happy / blue
rich | poor | wealthy / clean / sweet
strong | weak | heavy / tall / round
happy | sad | glad / tall / fast
long | short | wide / blue / quick
heavy | light | big / dark / soft
hard | soft | rough / loud / tall
loud | quiet | noisy / bright / short
clean | dirty | pure / tidy / smooth
easy | difficult | simple / quick / small
thick | thin | fat / wet / sour
wide | narrow | broad / deep / slow
deep | shallow | dark / wide / wet
sharp | blunt | pointed / long / bright
sweet | bitter | sugary / soft / cold
brave | cowardly | bold / strong / kind
cheap | expensive | small / new / simple
safe | dangerous | secure / quiet / closed
asleep | awake | tired / warm / alone
guilty | innocent | sorry / angry / ashamed
public | private | common / open / famous
ancient | modern | old / broken / huge
polite | rude | kind / quiet / clever
lazy | hardworking | slow / tired / idle
generous | stingy | kind / wealthy / gentle
smooth | rough | flat / soft / shiny
tight | loose | firm / small / closed
wild | tame | angry / fast / hungry
arrive | depart | come / reach / enter
accept | reject | receive / take / agree
increase | decrease | grow / expand / rise
remember | forget | recall / think / know
build | destroy | make / create / lift
attack | defend | fight / strike / run
borrow | lend | take / use / keep
laugh | cry | smile / talk / sing
teach | learn | explain / show / read
import | export | bring / buy / carry
expand | contract | stretch / grow / widen
allow | forbid | permit / let / offer
appear | disappear | come / seem / look
friend | enemy | neighbor / partner / guest
victory | defeat | win / battle / prize
hero | villain | soldier / winner / star
top | bottom | peak / side / roof
arrival | departure | coming / journey / station
profit | loss | gain / money / price
heaven | hell | sky / cloud / angel
"""

TOLD = (
    "The opposite of tall is short. The opposite of {0} is",
    "Word: tall, opposite: short\nWord: cheap, opposite: expensive\nWord: {0}, opposite:",
    'The word "{0}" means the opposite of the word "',
)
ASKED = (
    "The opposite of {0} is",
    "Word: hot, opposite: cold\nWord: up, opposite: down\nWord: {0}, opposite:",
    "If it is not {0} at all but quite the contrary, then it is",
)
ADJECTIVES = 30
"""So many rows at the top of CHOSEN can stand where an adjective stands."""


def antonyms() -> Iterator[Item]:
    """Rigid pairs are told, one way or the other; the others are chosen beside what means the same or nothing of it."""
    for one, other in rows(RIGID):
        name = f"antonyms/{one}"
        yield answer(name, turn(TOLD, name).format(one), listed(other))
    for number, (word, right, wrong) in enumerate(rows(CHOSEN)):
        name = f"antonyms/choice {word}"
        wordings = ASKED if number < ADJECTIVES else ASKED[:2]
        wrongs = listed(wrong)
        ahead = place(name) % 2
        yield choice(
            name, turn(wordings, name).format(word), f" {right}", [f" {one}" for one in wrongs[ahead:] + wrongs[:ahead]]
        )
