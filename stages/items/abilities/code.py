"""Python: what an expression gives, and how a program goes on. The tests run what they can."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import answer, choice
from stages.measures.items import Item

EXPRESSIONS = (
    ("len('hello')", "5", ("4", "6", "10")),
    ("len([1, 2, 3])", "3", ("2", "4", "6")),
    ("'a' + 'b'", "'ab'", ("'a b'", "'ba'", "None")),
    ("2 ** 3", "8", ("6", "5", "9")),
    ("7 // 2", "3", ("4", "2", "1")),
    ("7 % 2", "1", ("3", "0", "2")),
    ("10 / 2", "5.0", ("20", "0.5", "8")),
    ("max([3, 9, 4])", "9", ("3", "4", "16")),
    ("min([3, 9, 4])", "3", ("9", "4", "16")),
    ("sum([1, 2, 3])", "6", ("3", "5", "123")),
    ("sorted([3, 1, 2])", "[1, 2, 3]", ("[3, 2, 1]", "[3, 1, 2]", "[2, 1, 3]")),
    ("'abc'[0]", "'a'", ("'b'", "'c'", "'abc'")),
    ("'abc'[-1]", "'c'", ("'a'", "'b'", "'ab'")),
    ("'abc'.upper()", "'ABC'", ("'abc'", "'Abc'", "'CBA'")),
    ("'ABC'.lower()", "'abc'", ("'ABC'", "'Abc'", "'cba'")),
    ("'a,b,c'.split(',')", "['a', 'b', 'c']", ("['a,b,c']", "'abc'", "['c', 'b', 'a']")),
    ("'-'.join(['a', 'b'])", "'a-b'", ("'ab'", "['a-b']", "'-ab'")),
    ("list(range(3))", "[0, 1, 2]", ("[1, 2, 3]", "[0, 1, 2, 3]", "[3]")),
    ("3 == 3", "True", ("False", "3", "None")),
    ("3 > 5", "False", ("True", "3", "5")),
    ("not True", "False", ("True", "None", "1")),
    ("True and False", "False", ("True", "None", "0")),
    ("True or False", "True", ("False", "None", "0")),
    ("abs(-4)", "4", ("-4", "0", "16")),
    ("int('12')", "12", ("'12'", "[12]", "21")),
    ("str(12)", "'12'", ("12", "[12]", "'1'")),
    ("'ab' * 2", "'abab'", ("'aabb'", "'ab2'", "'ab'")),
    ("[1, 2] + [3]", "[1, 2, 3]", ("[3, 3]", "[1, 2, [3]]", "6")),
    ("{'a': 1}['a']", "1", ("'a'", "'1'", "{'a': 1}")),
    ("'a' in 'cat'", "True", ("False", "'a'", "1")),
    ("round(3.7)", "4", ("3", "7", "'4'")),
    ("[x * 2 for x in [1, 2]]", "[2, 4]", ("[1, 2]", "[1, 4]", "[3, 4]")),
    ("'hello'.replace('l', 'x')", "'hexxo'", ("'hello'", "'hexlo'", "'xxxxx'")),
    ("type(3.5).__name__", "'float'", ("'int'", "'str'", "'list'")),
)
"""Expression, what Python shows, what it does not."""
TOLD = (
    ("add", "def add(a, b):\n    return a +", "b"),
    ("multiply", "def multiply(x, y):\n    return x *", "y"),
    ("subtract", "def subtract(left, right):\n    return left -", "right"),
    ("main", "def main():\n    print('Hello')\n\n\nif __name__ ==", "\"__main__\"/'__main__'"),
    ("numpy", "# Arrays of numbers\nimport numpy as", "np"),
    ("pandas", "# Tables with columns\nimport pandas as", "pd"),
    ("matplotlib", "# Draw a curve\nimport matplotlib.pyplot as", "plt"),
    ("self", "class Dog:\n    def __init__(self, name):\n        self.name =", "name"),
    ("age", "class Person:\n    def __init__(self, name, age):\n        self.name = name\n        self.age =", "age"),
    ("loop", "numbers = [1, 2, 3]\nfor number in", "numbers"),
    ("total", "total = 0\nfor price in prices:\n    total +=", "price"),
    ("square", "def square(n):\n    return n *", "n"),
    ("open", "with open(path) as file:\n    text =", "file.read()/file.readlines()"),
    ("append", "squares = []\nfor i in range(10):\n    squares.", "append"),
    ("return", "def greet(name):\n    message = 'Hello, ' + name\n    return", "message"),
)
CHOSEN = (
    (
        "else",
        "if x > 0:\n    print('positive')\nelif x < 0:\n    print('negative')\nelse:\n    print('",
        "zero')",
        ("positive')", "ten')", "odd')"),
    ),
    ("for", "# Say it ten times\nfor i in", " range(10):", (" while(10):", " print(10):", " import(10):")),
    ("def", "def is_even(n):\n    return n % 2 ==", " 0", (" n", " 2", " 5")),
    ("odd", "def is_odd(n):\n    return n % 2 ==", " 1", (" 0", " 2", " n")),
    ("while", "count = 0\nwhile count < 5:\n    count +=", " 1", (" 'a'", " []", " 0")),
    (
        "factorial",
        "def factorial(n):\n    if n <= 1:\n        return 1\n    return n *",
        " factorial(n - 1)",
        (" factorial(n)", " n", " print(n)"),
    ),
    ("try", "try:\n    value = int(text)\nexcept", " ValueError:", (" range:", " print:", " len:")),
    ("lambda", "names.sort(key=", "len)", ("for)", "import)", "while)")),
    ("import", "import os\nfiles = os.", "listdir(path)", ("append(path)", "upper(path)", "sqrt(path)")),
    ("math", "import math\nroot = math.", "sqrt(16)", ("append(16)", "upper(16)", "split(16)")),
    ("json", "import json\ndata = json.", "loads(text)", ("sqrt(text)", "append(text)", "sleep(text)")),
    ("random", "import random\nn = random.", "randint(1, 6)", ("append(1, 6)", "upper(1, 6)", "loads(1, 6)")),
    ("dict", "ages = {'Anna': 30, 'Tom'", ": 25}", ("= 25}", ", 25]", "(25)")),
    ("list", "colors = ['red', 'green',", " 'blue']", (" 'blue'}", " 'blue')", " blue:")),
    ("none", "if result is", " None:", (" def:", " for:", " import:")),
    ("not", "if name not", " in names:", (" for names:", " def names:", " with names:")),
    ("reverse", "def reverse(text):\n    return text", "[::-1]", ("[::1]", "[0]", "[1:1]")),
    ("class", "class Cat(Animal):\n    def speak(self):\n        return", " 'Meow'", (" import", " 'Woof'", " def")),
    ("maximum", "def larger(a, b):\n    if a > b:\n        return a\n    return", " b", (" a", " 0", " None")),
    (
        "length",
        "def average(numbers):\n    return sum(numbers) /",
        " len(numbers)",
        (" max(numbers)", " sum(numbers)", " numbers"),
    ),
    ("comment", "# Print the numbers from 1 to 10\nfor i in range(1,", " 11):", (" 1):", " 2):", " 0):")),
)
BEFORE = (">>> ", ">>> 1 + 1\n2\n>>> ")


def code() -> Iterator[Item]:
    """Expressions and lines; where programs may go on in several ways, chosen among what would be wrong."""
    for number, (expression, right, wrong) in enumerate(EXPRESSIONS):
        prompt = f"{BEFORE[number % 2]}{expression}\n"
        yield choice(f"code/{expression}", prompt, right, wrong)
    for key, prompt, accepted in TOLD:
        yield answer(f"code/line {key}", prompt, accepted.split("/"))
    for key, prompt, right, wrong in CHOSEN:
        yield choice(f"code/choice {key}", prompt, right, wrong)
