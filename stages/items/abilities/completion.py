"""How a sentence goes on, if one knows the world."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import choice, listed, rows
from stages.measures.items import Item

SENTENCES = """
coat | She put on her coat because it was | cold outside | hot outside / dark inside
umbrella | He opened his umbrella because it began to | rain | sing / smell
hungry | The boy was hungry, so he ate a | sandwich | pencil / stone
thirsty | The girl was thirsty, so she drank some | water | sand / paper
tired | After the long walk they were tired and wanted to | rest | run / dance
key | He could not open the door because he had lost his | key | hat / spoon
dark | It was dark in the room, so she turned on the | light | water / radio
fire | The house was on fire, so they called the | firefighters | bakers / painters
sick | The child was sick, so the mother took him to the | doctor | circus / baker
letter | He wrote a letter, put it into an envelope and bought a | stamp | ladder / chair
fish | The fisherman threw his net into the | sea | oven / fire
bird | The bird built its nest in a | tree | pocket / cup
plane | The plane landed at the | airport | kitchen / bookshelf
train | They were waiting for the train at the | station | beach / bakery
book | She went to the library to borrow a | book | cow / shoe
hair | His hair was too long, so he went to the | barber | butcher / dentist
tooth | Her tooth hurt, so she went to the | dentist | barber / baker
bread | To make toast, you need a slice of | bread | soap / wood
soup | The soup was too hot, so he waited until it was | cool | taller / louder
snow | The children built a snowman out of | snow | sand / milk
ice | When ice gets warm, it | melts | burns / barks
baby | The baby was crying because it was | hungry | elected / printed
dog | When the stranger came, the dog began to | bark | read / sing
cat | The cat caught a | mouse | truck / cloud
glass | The glass fell on the floor and | broke | flew / grew
balloon | He let go of the balloon, and it flew up into the | sky | drawer / soup
seed | She planted a seed, watered it, and it began to | grow | laugh / drive
money | She had no money with her, so she could not | pay | sleep / breathe
phone | The phone was ringing, so he | answered it | drank it / planted it
clock | The alarm clock rang, and he got out of | bed | soup / paper
wash | His hands were dirty, so he went to | wash them | eat them / sell them
candle | It was her birthday, and she blew out the candles on the | cake | river / horse
rain | It had rained all night, and in the morning the streets were | wet | hungry / married
summer | It was a hot summer day, so they went to the beach to | swim | ski / freeze
winter | In winter the lake was frozen, and the children went | skating | swimming / harvesting
shoes | Before he went out, he put his shoes on his | feet | ears / teeth
glasses | She could not read the small letters without her | glasses | gloves / shoes
knife | He cut the bread with a | knife | pillow / letter
soap | She washed her face with water and | soap | ink / gravel
exam | The student studied hard because he wanted to pass the | exam | river / sugar
milk | The milk had been out of the fridge for days and smelled | bad | blue / tall
gift | He wrapped the present in colorful | paper | soup / air
cook | The cook tasted the soup and added a little | salt | gravel / ink
farmer | Early in the morning the farmer went out to milk the | cows | trees / roads
bus | She missed the bus, so she came | late | blue / first
secret | Please tell no one about it; it is a | secret | sandwich / window
road | Before you cross the road, look left and | right | wrong / asleep
horse | The rider got on his | horse | lamp / river
band | The band played music, and everyone began to | dance | rust / boil
painter | The painter dipped the brush into the | paint | violin / clouds
stairs | The elevator was broken, so they had to take the | stairs | medicine / photograph
movie | The movie was so funny that everyone | laughed | froze / rusted
movie sad | The end of the story was so sad that she began to | cry | boil / bark
window | It was too warm in the room, so he opened the | window | oven / pencil
garden | The gardener watered the | flowers | clouds / hammers
cold | He had a bad cold and was coughing, so he stayed in | bed | jail / space
map | They were lost in the city, so they looked at the | map | soup / ceiling
king | The king sat on his golden | throne | sandwich / carrot
ship | The captain stood on the deck of his | ship | bakery / carrot
moon | At night they looked up and saw the moon and the | stars | sofas / carpets
battery | His phone did not work because the battery was | empty | angry / green
tire | The car stopped because it had run out of | gas | butter / songs
salt | He had put too much salt into the soup, so nobody | liked it | wore it / drove it
shirt | His shirt was wrinkled, so he | ironed it | fried it / planted it
"""


def completion() -> Iterator[Item]:
    """What comes next, beside what does not."""
    for key, prompt, right, wrong in rows(SENTENCES):
        yield choice(f"completion/{key}", prompt, f" {right}", [f" {one}" for one in listed(wrong)])
