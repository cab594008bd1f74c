"""Words of English in French, Spanish, German and Chinese."""

from __future__ import annotations

from collections.abc import Iterator

from stages.items.abilities.making import choice, others, rows, turn
from stages.measures.items import Item

WORDS = """
house | maison | casa | Haus | 房子
water | eau | agua | Wasser | 水
book | livre | libro | Buch | 书
dog | chien | perro | Hund | 狗
cat | chat | gato | Katze | 猫
horse | cheval | caballo | Pferd | 马
fish | poisson | pez | Fisch | 鱼
bread | pain | pan | Brot | 面包
milk | lait | leche | Milch | 牛奶
apple | pomme | manzana | Apfel | 苹果
tree | arbre | árbol | Baum | 树
flower | fleur | flor | Blume | 花
sun | soleil | sol | Sonne | 太阳
moon | lune | luna | Mond | 月亮
mountain | montagne | montaña | Berg | 山
fire | feu | fuego | Feuer | 火
night | nuit | noche | Nacht | 夜晚
friend | ami | amigo | Freund | 朋友
mother | mère | madre | Mutter | 母亲
father | père | padre | Vater | 父亲
school | école | escuela | Schule | 学校
door | porte | puerta | Tür | 门
hand | main | mano | Hand | 手
eye | œil | ojo | Auge | 眼睛
heart | cœur | corazón | Herz | 心
red | rouge | rojo | rot | 红色
white | blanc | blanco | weiß | 白色
green | vert | verde | grün | 绿色
one | un | uno | eins | 一
two | deux | dos | zwei | 二
three | trois | tres | drei | 三
seven | sept | siete | sieben | 七
Monday | lundi | lunes | Montag | 星期一
Friday | vendredi | viernes | Freitag | 星期五
January | janvier | enero | Januar | 一月
thank you | merci | gracias | danke | 谢谢
yes | oui | sí | ja | 是
"""
LANGUAGES = ("French", "Spanish", "German", "Chinese")
SHOWN = {
    "French": ("king", "roi", "snow", "neige"),
    "Spanish": ("king", "rey", "snow", "nieve"),
    "German": ("king", "König", "snow", "Schnee"),
    "Chinese": ("king", "国王", "snow", "雪"),
}
"""Two words that the prompts give as examples."""
TOLD = (
    "English: {1}, {0}: {2}\nEnglish: {3}, {0}: {4}\nEnglish: {5}, {0}:",
    'The {0} word for "{1}" is "{2}". The {0} word for "{5}" is "',
)


def translation() -> Iterator[Item]:
    """Every word goes into two or three of the four languages, beside other words of the table."""
    table = list(rows(WORDS))
    for number, row in enumerate(table):
        for column in ((1, 3), (2, 4))[number % 2] if number % 3 else (1, 2, 4):
            pool = [one[column] for one in table if one is not row]
            yield _word(row[0], row[column], column, pool)


def _word(word: str, right: str, column: int, pool: list[str]) -> Item:
    language = LANGUAGES[column - 1]
    name = f"translation/{word} in {language}"
    told = turn(TOLD, name)
    space = "" if told is TOLD[1] else " "
    wrong = [f"{space}{one}" for one in others(pool, right, 3, name)]
    return choice(name, told.format(language, *SHOWN[language], word), f"{space}{right}", wrong)
