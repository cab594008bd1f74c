"""English grammar: what comes next in a sentence, beside the form that would be wrong."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import choice, rows
from stages.measures.items import Item

PAIRS = """
agreement 1 | The keys to the old cabinet | are on the table. | is on the table.
agreement 2 | The author of the books | is very famous. | are very famous.
agreement 3 | The dogs next door | bark every night. | barks every night.
agreement 4 | My sister | lives in a small town. | live in a small town.
agreement 5 | The pictures on the wall | were painted long ago. | was painted long ago.
agreement 6 | Each of the players | has a number. | have a number.
agreement 7 | The answer to all these questions | is simple. | are simple.
agreement 8 | Nobody in the two houses | knows him. | know him.
agreement 9 | The teacher and the student | are talking. | is talking.
agreement 10 | There | are many books here. | is many books here.
agreement 11 | The news | is good today. | are good today.
agreement 12 | The boys who play in the street | are loud. | is loud.
agreement 13 | The woman who owns the dogs | walks slowly. | walk slowly.
agreement 14 | One of my friends | works here. | work here.
reflexive 1 | The girl looked at | herself in the mirror. | himself in the mirror.
reflexive 2 | The boys washed | themselves after the game. | himself after the game.
reflexive 3 | My father cut | himself while shaving. | herself while shaving.
reflexive 4 | We enjoyed | ourselves at the party. | themselves at the party.
reflexive 5 | I taught | myself to play the piano. | yourself to play the piano.
determiner 1 | She bought | these flowers. | this flowers.
determiner 2 | He read | that book. | those book.
determiner 3 | We do not have | much time. | many time.
determiner 4 | They have | many friends. | much friends.
determiner 5 | He ate | an apple. | a apple.
determiner 6 | It took us | an hour. | a hour.
determiner 7 | She goes to | a university. | an university.
determiner 8 | Every | child likes games. | children likes games.
determiner 9 | There are | too many cars here. | too much cars here.
past 1 | Yesterday he | went to school. | goed to school.
past 2 | The window was | broken by the storm. | broke by the storm.
past 3 | She has | written three letters. | wrote three letters.
past 4 | They have already | eaten their lunch. | ate their lunch.
past 5 | Last week I | bought a new bike. | buyed a new bike.
past 6 | He has | gone home. | went home.
past 7 | The song was | sung by a child. | sang by a child.
past 8 | Did you | see the moon? | saw the moon?
past 9 | She did not | know the answer. | knew the answer.
past 10 | When I came in, he was | reading a book. | read a book.
verb 1 | He can | swim very well. | swims very well.
verb 2 | She wants | to learn Spanish. | learn Spanish.
verb 3 | They enjoy | playing chess. | to playing chess.
verb 4 | We must | leave now. | leaving now.
verb 5 | He made me | laugh. | to laugh.
verb 6 | I look forward to | seeing you. | see you.
verb 7 | Let us | go home. | going home.
verb 8 | He is good at | drawing. | draw.
verb 9 | If I were you, I | would wait. | will waited.
verb 10 | She has lived here | since 2010. | for 2010.
verb 11 | They have been married | for ten years. | since ten years.
verb 12 | He stopped | smoking last year. | smoke last year.
pronoun 1 | Please give the book to | me. | I.
pronoun 2 | Between you and | me, it is too late. | I, it is too late.
pronoun 3 | This is the man | who sold me the car. | which sold me the car.
pronoun 4 | The house | which we bought is old. | who we bought is old.
pronoun 5 | My brother and | I went to the cinema. | me went to the cinema.
pronoun 6 | That coat is | hers. | her.
pronoun 7 | The dog wagged | its tail. | it tail.
pronoun 8 | I know the girl | whose father is a pilot. | who father is a pilot.
comparison 1 | An elephant is | bigger than a mouse. | more big than a mouse.
comparison 2 | This is the | most beautiful garden of all. | beautifulest garden of all.
comparison 3 | She is as | tall as her mother. | taller as her mother.
comparison 4 | He runs | faster than I do. | more fast than I do.
comparison 5 | Today is | better than yesterday. | gooder than yesterday.
negation 1 | I have never | seen any of them. | seen none of them.
negation 2 | He does not | like fish. | likes fish.
negation 3 | She does not have | any money. | no any money.
negation 4 | Nobody has | ever been there. | never been there.
negation 5 | There was hardly | anyone at the door. | nobody at the door.
adverb 1 | She sings | beautifully. | beautiful.
adverb 2 | He drives very | carefully. | careful.
adverb 3 | The child spoke very | quietly. | quiet.
adverb 4 | You speak English very | well. | good.
order 1 | She asked me where | I lived. | did I live.
order 2 | Never before | had I seen so much snow. | I had seen so much snow.
order 3 | She lives in a | big red house. | red house big.
order 4 | He always | gets up early. | up gets early.
order 5 | Do you know what time | it is? | is it?
order 6 | I gave | him the letter. | the letter him.
preposition 1 | The train arrives | at six o'clock. | on six o'clock.
preposition 2 | We met | on Monday. | in Monday.
preposition 3 | He was born | in 1990. | at 1990.
preposition 4 | She is afraid | of spiders. | from spiders.
preposition 5 | They are waiting | for the bus. | to the bus.
preposition 6 | It depends | on the weather. | of the weather.
"""


def grammar() -> Iterator[Item]:
    """Minimal pairs."""
    for key, prompt, right, wrong in rows(PAIRS):
        yield choice(f"grammar/{key}", prompt, f" {right}", [f" {wrong}"])
