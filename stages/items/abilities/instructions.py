"""Following an instruction: what a user says, and what must hold of any answer that follows it."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import rows
from stages.measures.items import Check, Item

ASKED = """
words 1 | Write one short sentence about the sea. | words_at_most 25
words 2 | Describe a cat in at most ten words. | words_at_most 10
words 3 | Name one color. Answer with a single word. | words_at_most 1
words 4 | Name one animal. Answer with a single word. | words_at_most 1
words 5 | Answer with one word only: what is the capital of France? | words_at_most 1; contains Paris
words 6 | Answer yes or no, with one word: is fire hot? | words_at_most 1; contains yes
words 7 | In at most fifteen words, say what a bicycle is. | words_at_most 15
words 8 | Write a story about a dog. Use at least twenty words. | words_at_least 20
words 9 | Tell me about the Moon in at least fifteen words. | words_at_least 15
words 10 | Explain in at least twelve words why people sleep. | words_at_least 12
words 11 | Give me the name of one fruit. Say nothing else. | words_at_most 3
words 12 | In at most five words, say good morning. | words_at_most 5
contains 1 | Write a sentence that contains the word "river". | contains river
contains 2 | Write a sentence that contains the word "bread". | contains bread
contains 3 | Write one sentence with the words "dog" and "garden". | contains dog; contains garden
contains 4 | Tell me something about London. Mention the river Thames. | contains Thames
contains 5 | Write a greeting to a person called Maria. Use her name. | contains Maria
contains 6 | Write a short sentence about the weather and use the word "sunny". | contains sunny
contains 7 | Repeat this word: banana | contains banana
contains 8 | Repeat this sentence exactly: The train is late. | contains The train is late
contains 9 | List three colors. One of them must be red. | contains red
contains 10 | Write a sentence about music in which the word "piano" stands. | contains piano
contains 11 | Use the number 42 in a sentence. | contains 42
contains 12 | Invite Tom to a party on Saturday. Name the day. | contains Saturday
omits 1 | Describe snow without using the word "white". | omits white; words_at_least 3
omits 2 | Write a sentence about a lion without using the word "animal". | omits animal; words_at_least 3
omits 3 | Name three fruits, but not the apple. | omits apple; words_at_least 3
omits 4 | Say something about summer. Do not use the word "hot". | omits hot; words_at_least 3
omits 5 | Write one sentence without any comma. | omits ,; words_at_least 3
omits 6 | Describe your favorite food. Do not mention pizza. | omits pizza; words_at_least 3
starts 1 | Write a sentence that begins with the word "Today". | starts_with Today
starts 2 | Write a sentence that begins with the words "In winter". | starts_with In winter
starts 3 | Begin your answer with "Yes": do birds have wings? | starts_with Yes
starts 4 | Begin your answer with "Once upon a time" and tell a short story. | starts_with Once upon a time
starts 5 | Begin your answer with the word "Water" and say what water is. | starts_with Water
starts 6 | Write a letter to a friend. Begin it with "Dear". | starts_with Dear
starts 7 | Continue this sentence, and repeat its beginning: My favorite color is | starts_with My favorite color is
ends 1 | Write one question about dogs. | ends_with ?
ends 2 | Ask me how I am. Write only the question. | ends_with ?
ends 3 | Write one sentence and end it with an exclamation mark. | ends_with !
ends 4 | Write one sentence about birds and end it with a full stop. | ends_with .
ends 5 | Say "thank you" and end with an exclamation mark. | contains thank you; ends_with !
ends 6 | Ask a question about the weather. Write only the question. | ends_with ?
case 1 | Write the word "hello" in capital letters only. | case upper; contains hello
case 2 | Write your whole answer in lowercase letters: name three animals. | case lower
case 3 | Answer in capital letters only: what color is grass? | case upper
case 4 | Write the name of a country in lowercase letters. Say nothing else. | case lower
lines 1 | List three fruits, one on each line. Write nothing else. | lines 3
lines 2 | List two animals, one on each line. Write nothing else. | lines 2
lines 3 | Write the numbers one, two and three, each on a line of its own. | lines 3
lines 4 | Write one line of text about the wind. | lines 1
lines 5 | Name four seasons, one on each line, with nothing before or after them. | lines 4
json 1 | Write a JSON object with the key "name" and the value "Tom", and no more. | json; contains name; contains Tom
json 2 | Write a JSON list of the numbers 1, 2 and 3. Write only the JSON. | json
json 3 | Write an empty JSON object. Write only the JSON. | json
language 1 | Describe the Sun in English. | language en; words_at_least 3
language 2 | Answer in English: what do bees make? | language en; contains honey
language 3 | 请用中文介绍一下北京。 | language zh
language 4 | 请用中文回答：太阳是什么？ | language zh
language 5 | Answer in Chinese: how are you? | language zh
language 6 | 用一句中文描述春天。 | language zh
language 7 | 你好！请用中文做自我介绍。 | language zh
"""


def instructions() -> Iterator[Item]:
    """Each with its checks, all of which a program can make."""
    for key, prompt, demands in rows(ASKED):
        checks = tuple(_check(one.strip()) for one in demands.split(";"))
        yield Item(
            id=f"instructions/{key.replace(' ', '-')}",
            ability="instructions",
            language="zh" if "一" <= prompt[0] <= "鿿" else "en",
            task="instructions",
            prompt=prompt,
            checks=checks,
        )


def _check(said: str) -> Check:
    """A demand as it is written above: `lines 3`."""
    demand, _, value = said.partition(" ")
    number = value.isdecimal() and demand != "contains"
    return Check.model_validate({"demand": demand, "value": int(value) if number else value or None})
