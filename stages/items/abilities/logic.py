"""Simple logic: orders, classes, exclusion, conditions. What is right follows from the prompt alone."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.contexts import PEOPLE, invented
from stages.items.abilities.making import choice, listed, others, rows
from stages.measures.items import Item

ORDERS = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("richer", "richest", "poorest"),
    ("stronger", "strongest", "weakest"),
    ("heavier", "heaviest", "lightest"),
)
CLASSES = """
All dogs are animals. Rex is a dog. So Rex is | an animal | a plant / a number
All birds have wings. A robin is a bird. So a robin has | wings | wheels / fins
No whale can fly. Moby is a whale. So Moby cannot | fly | swim / dive
All roses are flowers. This plant is a rose. So this plant is | a flower | a fruit / a tree
Every student has a card. Lucy is a student. So Lucy has | a card | a horse / a garden
All squares have four sides. This shape is a square. So this shape has | four sides | three sides / five sides
All cars need fuel. This is a car. So it needs | fuel | hay / a ticket
Everyone in the village speaks French. Luc lives in the village. So Luc speaks | French | German / Chinese
Only members may enter the club. Ben may enter the club. So Ben is | a member | a stranger / a child
All the balls in the bag are red. Tom takes a ball out of the bag. The ball is | red | blue / green
Every drawer is locked except the third. The drawer that is open is the | third | first / second
All cats like milk. Mimi is a cat. So Mimi likes | milk | hay / coffee
No reptile has fur. A snake is a reptile. So a snake has no | fur | skin / tongue
All metals conduct electricity. Copper is a metal. So copper conducts | electricity | sugar / light
Every house on this street is white. Anna lives on this street. Her house is | white | brown / green
"""
CONDITIONS = """
If it rains, the street gets wet. It rains. So the street gets | wet | dry / warm
If the light is red, cars must stop. The light is red. So cars must | stop | go / turn
If Tom is late, he takes a taxi. Tom is late. So he takes a | taxi | train / bike
If the shop is closed, we eat at home. The shop is closed. So we eat at | home | school / work
If the dog barks, the baby wakes up. The dog barks. So the baby wakes | up | down / out
Either the key is in the box or it is in the bag. It is not in the box. So it is in the | bag | box / car
The cake is either in the oven or on the table. It is not in the oven. So it is on the | table | oven / floor
Anna is either a doctor or a teacher. She is not a teacher. So she is a | doctor | teacher / pilot
The meeting is on Monday or on Friday. It is not on Monday. So it is on | Friday | Monday / Sunday
One of two doors is open. The left door is closed. So the open door is on the | right | left / roof
The coin is in one of my hands. It is not in my right hand. So it is in my | left hand | right hand / pocket
Tom or Ben broke the window. Tom did not do it. So it was | Ben | Tom / Anna
If a number is even, it can be divided by two. Ten is even. So ten can be divided by | two | three / seven
If you heat ice, it melts. Tom heats ice. So the ice | melts | freezes / burns
If the switch is off, the lamp is dark. The switch is off. So the lamp is | dark | bright / blue
"""
PLACES = (
    ("{0} is north of {1}. So {1} is to the", "south of", "north of"),
    ("{0} is to the left of {1}. So {1} is to the", "right of", "left of"),
    ("{0} arrived before {1}. So {1} arrived", "after", "before"),
    ("{0} is above {1}. So {1} is", "below", "above"),
    ("{0} is smaller than {1}. So {1} is", "bigger than", "smaller than"),
    ("{0} is east of {1}. So {1} is to the", "west of", "east of"),
)
PARENTS = (
    ("{0} is a parent of {1}. So {1} is a", "child of {0}", "parent of {0}"),
    ("{0} bought a car from {1}. So {1}", "sold a car to {0}", "bought a car from {0}"),
    ("{0} is married to {1}. So {1} is", "married to {0}", "the child of {0}"),
    ("{0} taught {1} to swim. So {1}", "learned to swim from {0}", "taught {0} to swim"),
    ("{0} lent {1} a book. So {1}", "borrowed a book from {0}", "lent {0} a book"),
    ("{0} lost the game against {1}. So {1}", "won the game against {0}", "lost the game against {0}"),
)
_CHAIN = "{0} is {how} than {1}. {1} is {how} than {2}. Of the three, the {most} is"


def logic() -> Iterator[Item]:
    """Chosen among what the prompt names."""
    for number in range(18):
        yield _order(number)
    for kind, table in (("class", CLASSES), ("condition", CONDITIONS)):
        for number, (prompt, right, wrong) in enumerate(rows(table), 1):
            yield choice(f"logic/{kind} {number}", prompt, f" {right}", [f" {one}" for one in listed(wrong)])
    for number, (prompt, right, wrong) in enumerate((*PLACES, *PARENTS), 1):
        one, other = others(PEOPLE, "", 2, f"converse {number}")
        if (prompt, right, wrong) in PLACES[:1] + PLACES[5:]:
            one, other = invented(number * 3), invented(number * 3 + 7)
        tail = f" {one}" if (prompt, right, wrong) in PLACES else ""
        said = [text.format(one, other) + tail for text in (right, wrong)]
        yield choice(f"logic/converse {number}", prompt.format(one, other), f" {said[0]}", [f" {said[1]}"])


def _order(number: int) -> Item:
    name = f"logic/order {number + 1}"
    how, most, least = ORDERS[number % len(ORDERS)]
    one, two, three = others(PEOPLE, "", 3, name)
    asked, right = ((most, one), (least, three))[number // len(ORDERS) % 2]
    prompt = _CHAIN.format(one, two, three, how=how, most=asked)
    return choice(name, prompt, f" {right}", [f" {who}" for who in (one, two, three) if who != right])
