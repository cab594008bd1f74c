"""What most people know: nature, the body, history, culture."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import answer, choice, listed, rows
from stages.measures.items import Item

TOLD = """
largest planet | The largest planet in the solar system is | Jupiter
closest planet | The planet that is closest to the Sun is | Mercury
red planet | The planet that is known as the Red Planet is | Mars
ring planet | The planet that is best known for its large rings is | Saturn
third planet | The third planet from the Sun is | Earth/the Earth/our Earth/our own planet Earth/our planet, Earth
moon | The natural satellite that orbits the Earth is called the | Moon
star | The star at the center of our solar system is called the | Sun
galaxy | The galaxy that contains our solar system is called the | Milky Way
largest ocean | The largest ocean on Earth is the | Pacific
highest mountain | The highest mountain on Earth is | Mount Everest/Everest/Mt. Everest/Mt Everest
largest animal | The largest animal on Earth is the | blue whale
tallest animal | The tallest animal on Earth is the | giraffe
fastest animal | The fastest land animal is the | cheetah
largest continent | The largest continent on Earth is | Asia
largest country | The largest country in the world by area is | Russia
coldest continent | The South Pole lies on the continent of | Antarctica
longest wall | The Great Wall is one of the most famous sights of | China
pyramids | The Great Pyramid of Giza stands in | Egypt
eiffel tower | The Eiffel Tower stands in the city of | Paris
colosseum | The ancient Colosseum stands in the city of | Rome
taj mahal | The Taj Mahal is a famous building in | India/Agra
statue of liberty | The Statue of Liberty stands in the harbor of | New York
big ben | The clock tower called Big Ben stands in the city of | London
kremlin | The Kremlin stands in the city of | Moscow
hamlet | The play "Hamlet" was written by William | Shakespeare
relativity | The theory of relativity was developed by Albert | Einstein
gravity | The laws of motion and gravity were written down by Sir Isaac | Newton
evolution | The theory of evolution by natural selection was put forward by Charles | Darwin
mona lisa | The Mona Lisa was painted by Leonardo da | Vinci
sistine | The ceiling of the Sistine Chapel was painted by | Michelangelo
starry night | "The Starry Night" was painted by Vincent van | Gogh
ninth | The Ninth Symphony with the "Ode to Joy" was composed by Ludwig van | Beethoven
magic flute | "The Magic Flute" was composed by Wolfgang Amadeus | Mozart
oliver twist | The novel "Oliver Twist" was written by Charles | Dickens
pride | The novel "Pride and Prejudice" was written by Jane | Austen
nineteen | The novel "1984" was written by George | Orwell
harry potter | The Harry Potter books were written by J. K. | Rowling
sherlock | The detective Sherlock Holmes was invented by Arthur Conan | Doyle
first president | The first president of the United States was George | Washington
civil war president | The president of the United States during the Civil War was Abraham | Lincoln
moon landing | The first person to walk on the Moon was Neil | Armstrong
columbus | In 1492, the Atlantic was crossed by Christopher | Columbus
telephone | The telephone was patented in 1876 by Alexander Graham | Bell
penicillin | Penicillin was discovered by Alexander | Fleming
radium | Radium was discovered by Pierre and Marie | Curie
french emperor | The French emperor who lost the battle of Waterloo was | Napoleon
water | Water is made of two elements, hydrogen and | oxygen
salt | Table salt is made of sodium and | chlorine/chloride
photosynthesis | The process by which plants make food from sunlight is called | photosynthesis
breathing | The gas that people need to breathe in order to live is | oxygen
plants take | The gas that plants take from the air to grow is carbon | dioxide
boil | Water boils at sea level at 100 degrees | Celsius/C
frozen | Frozen water is called | ice
heart | The organ that pumps blood through the body is the | heart
lungs | People breathe with their | lungs/nose/mouth
brain | The organ that people think with is the | brain
largest organ | The largest organ of the human body is the | skin
teeth | A doctor who takes care of teeth is called a | dentist
bees | The insects that make honey are called | bees/honeybees/honey bees
silk | The insect that makes silk is called the | silkworm
web | An animal with eight legs that spins webs is a | spider
trunk | The animal that has a long trunk and big ears is the | elephant/African elephant
hump | The desert animal that carries a hump or two on its back is the | camel
stripes | The African animal that looks like a horse with black and white stripes is the | zebra
pouch | The Australian animal that hops and carries its young in a pouch is the | kangaroo/wallaby/red kangaroo
king of animals | The animal that is called the king of the jungle is the | lion
best friend | The animal that is called man's best friend is the | dog
"""
CHOSEN = """
sky | On a clear day, the color of the sky is | blue | green / red / brown
grass | In spring, the color of fresh grass is | green | blue / purple / black
snow | The color of fresh snow is | white | black / green / red
blood | The color of blood is | red | blue / green / yellow
banana | The color of a ripe banana is | yellow | blue / purple / gray
coal | The color of coal is | black | white / pink / yellow
mix | When blue paint is mixed with yellow paint, the result is | green | red / black / white
spider legs | The number of legs that a spider has is | eight | six / four / ten
insect legs | The number of legs that an insect has is | six | eight / four / ten
dog legs | The number of legs that a dog has is | four | two / six / eight
fingers | The number of fingers on one hand, with the thumb, is | five | four / six / ten
triangle | The number of sides of a triangle is | three | four / five / six
hexagon | The number of sides of a hexagon is | six | five / seven / eight
octagon | The number of sides of an octagon is | eight | six / seven / nine
planets | The number of planets in the solar system is | eight | six / twelve / five
football | The number of players of one football team on the field is | eleven | seven / nine / fifteen
chess | The number of squares on a chessboard is | 64 | 32 / 100 / 81
freezing | Water freezes at a temperature of | 0 degrees Celsius | 50 degrees Celsius / 100 degrees Celsius
war end | The Second World War ended in the year | 1945 | 1918 / 1939 / 1963
war begin | The First World War began in the year | 1914 | 1939 / 1945 / 1812
wall fall | The Berlin Wall fell in the year | 1989 | 1945 / 1961 / 2001
moon year | People first landed on the Moon in the year | 1969 | 1945 / 1989 / 1912
titanic | The ship Titanic sank in the year | 1912 | 1945 / 1812 / 1969
independence | The United States declared its independence in the year | 1776 | 1492 / 1865 / 1914
magnet | A magnet attracts things that are made of | iron | wood / glass / paper
paper | Paper is mostly made from | wood | iron / sand / milk
cheese | Cheese is made from | milk | eggs / water / apples
wine | Wine is made from | grapes | apples / milk / potatoes
bread | Bread is made mainly from | flour | rice / grapes / meat
glass | Glass is made mainly from | sand | wood / oil / wool
wool | Wool comes from | sheep | cotton / pigs / fish
raisin | A raisin is a dried | grape | apple / plum / tomato
east | In the morning, the sun rises in the | east | west / north / south
west | In the evening, the sun sets in the | west | east / north / south
panda | A giant panda eats mostly | bamboo | fish / meat / honey
whale | A whale is not a fish but a | mammal | bird / reptile / plant
bat | A bat can fly, but it is not a bird; it is a | mammal | fish / insect / reptile
frog | A frog is neither a fish nor a bird; it is an | amphibian | insect / octopus / herb
fly | A bird that cannot fly is the | penguin | eagle / sparrow / swallow
night | An animal that hunts at night is the | owl | hen / cow / butterfly
"""


def knowledge() -> Iterator[Item]:
    """Told in one word, or chosen among four."""
    for key, prompt, accepted in rows(TOLD):
        yield answer(f"knowledge/{key}", prompt, listed(accepted))
    for key, prompt, right, wrong in rows(CHOSEN):
        yield choice(f"knowledge/choice {key}", prompt, f" {right}", [f" {one}" for one in listed(wrong)])
