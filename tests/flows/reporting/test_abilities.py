"""What a report says of items: by ability, by step, flips, and where right answers went."""

import math
import re

import pytest

from flows.reporting.abilities import item_sets, whereabouts
from flows.reporting.report import Drawn, write_report
from tests.flows.made_up import made_up

RIGHT = {
    "dense": {"capitals": "111110", "sums": "1100", "noise": "0000"},
    "pruned": {"capitals": "100000", "sums": "1100", "noise": "0000"},
    "int8": {"capitals": "100000", "sums": "0101", "noise": "0000"},
    "cpu": {"capitals": "110000", "sums": "0101", "noise": "0000"},
}


def report(name):
    documents = [
        {
            "id": f"{ability}{number}", "slice": ability, "right": int(right), "chance": 0.0, "tokens": 5,
            "prompt": f"{ability} <{number}> is", "expected": "x & y", "answer": f" {name}{right}",
        }
        for ability, each in RIGHT[name].items() for number, right in enumerate(each)
    ]  # fmt: skip
    return {"items": True, "documents": documents, "measures": {"accuracy": 0.5}}


REPORTS = {(name, "abilities"): report(name) for name in RIGHT} | {("dense", "text"): {"measures": {"perplexity": 9.0}}}
CHAIN = ["dense", "pruned", "int8", "cpu"]


@pytest.fixture(scope="module")
def found():
    (only,) = item_sets(REPORTS, "dense", ["cpu"], CHAIN)
    return only


def test_rows_hold_right_answers_and_their_share_of_denses(found):
    rows = {row.name: row for row in found.abilities}
    assert [*rows] == ["all", "capitals", "sums", "noise"]
    assert (rows["all"].items, rows["all"].dense, rows["all"].cells["cpu"].right) == (14, 7, 4)
    assert rows["capitals"].cells["cpu"].ratio.point == pytest.approx(2 / 5)
    assert not rows["noise"].known and rows["noise"].cells["cpu"].ratio is None


def test_set_of_one_ability_has_one_row():
    reports = {key: one | {"documents": one["documents"][:6]} for key, one in REPORTS.items() if "documents" in one}
    (found,) = item_sets(reports, "dense", ["cpu"], CHAIN)
    assert [row.name for row in found.abilities] == ["all"] and [*found.heat["cpu"]] == ["all"]


def test_heat_is_the_change_from_dense_after_each_step(found):
    assert [*found.heat] == ["pruned", "int8", "cpu"]
    assert found.heat["pruned"] == {"all": (-4, 14), "capitals": (-4, 6), "sums": (0, 4), "noise": (0, 4)}
    assert found.heat["int8"]["sums"] == (0, 4), "one lost, one won"


def test_flips_stand_side_by_side(found):
    assert found.flipped == {"cpu": (4, 1)}
    assert found.alike == {"cpu": (0, None)}, "their reports say nothing of tokens"
    first = found.flips[0]
    assert (first.ability, first.prompt, first.dense, first.now, first.lost) == (
        "capitals", "capitals <2> is", " dense1", " cpu0", True
    )  # fmt: skip


def test_sentence_names_the_step_and_the_abilities_that_went():
    assert whereabouts(REPORTS, CHAIN) == [
        "abilities: cpu answers 4 right where dense answers 7; most were lost by pruned, 4 of 14 items (capitals 4)"
    ]
    assert whereabouts(REPORTS, ["dense", "dense"]) == []
    assert whereabouts({("cpu", "abilities"): report("cpu")}, CHAIN) == []
    assert whereabouts(REPORTS | {("cpu", "abilities"): report("dense")}, CHAIN) == [], "all came back"


def test_step_that_was_asked_some_of_the_items_is_compared_on_these():
    some = {name: dict(one, documents=list(one.get("documents", []))) for name, one in REPORTS.items()}
    some["pruned", "abilities"]["documents"] = some["pruned", "abilities"]["documents"][1:8]
    (found,) = item_sets(some, "dense", ["cpu"], CHAIN)
    assert found.heat["pruned"] == {"all": (-4, 7), "capitals": (-4, 5), "sums": (0, 2)}
    assert found.heat["cpu"]["noise"] == (0, 4)
    assert whereabouts(some, CHAIN)[0].endswith("most were lost by pruned, 4 of 7 items (capitals 4)")


def test_page_shows_abilities_heat_and_flips_escaped(found, tmp_path):
    result, manifests, reports, _ = made_up()
    lost = result.model_copy(update={"lost": whereabouts(REPORTS, CHAIN)})
    write_report(lost, manifests, reports, "", (), tmp_path / "report.html", drawn=Drawn(items=[found]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "What it can do: abilities" in text and "Where it was lost" in text
    assert "most were lost by pruned, 4 of 14 items (capitals 4)" in text
    assert "cpu: 4 right answers lost, 1 won" in text
    assert "capitals &lt;2&gt; is" in page and "x &amp; y" in page
    assert "0.4 (" in text and "dense guesses" in text


def test_pairs_of_texts_are_neither_right_nor_wrong_and_stand_in_no_table_of_abilities():
    documents = [
        {"id": f"p{n}", "slice": "near", "tokens": 3, "prompt": "a", "similarity": 0.1 * n, "gold": float(n)}
        for n in range(5)
    ]
    pairs = {(name, "pairs"): {"items": True, "documents": documents, "measures": {"spearman": 1.0}} for name in RIGHT}
    assert item_sets(REPORTS | pairs, "dense", ["cpu"], CHAIN) == item_sets(REPORTS, "dense", ["cpu"], CHAIN)
    assert whereabouts(REPORTS | pairs, CHAIN) == whereabouts(REPORTS, CHAIN)


def translations(matches):
    return {
        "items": True,
        "measures": {},
        "documents": [
            {"id": f"{n}", "slice": "news" if n % 2 else "talk", "tokens": 4, "prompt": "p", "expected": "e",
             "answer": "a", "bleu": [8, 8, match, match - 1, match - 2, match - 3, 8, 7, 6, 5]}
            for n, match in enumerate(matches)
        ],
    }  # fmt: skip


def test_translations_are_shown_by_their_measure_and_nothing_is_said_of_right_answers(tmp_path):
    reports = {("dense", "wmt"): translations([8, 8, 7, 6]), ("int8", "wmt"): translations([8, 6])}
    reports |= {("cpu", "wmt"): translations([6, 6, 5, 4])}
    (found,) = item_sets(reports, "dense", ["cpu"], CHAIN)
    assert (list(found.abilities), dict(found.heat), list(found.flips)) == ([], {}, [])
    assert [(one.ability, one.measure, one.items) for one in found.grades] == [
        ("all", "BLEU", 4), ("talk", "BLEU", 2), ("news", "BLEU", 2)
    ]  # fmt: skip
    whole = found.grades[0]
    wanted = [100 * math.prod((sum(m - k for m in of) / (len(of) * (8 - k))) for k in range(4)) ** 0.25
              for of in ([8, 8, 7, 6], [8, 6], [6, 6, 5, 4])]  # fmt: skip
    assert [whole.dense, whole.values["int8"], whole.values["cpu"]] == pytest.approx(wanted)
    assert whole.ratios["cpu"].point == pytest.approx(wanted[2] / wanted[0])
    assert whole.ratios["cpu"].low <= whole.ratios["cpu"].point <= whole.ratios["cpu"].high < 1
    assert whereabouts(reports, CHAIN) == []
    result, manifests, others, _ = made_up()
    write_report(result, manifests, others, "", (), tmp_path / "report.html", drawn=Drawn(items=[found]))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", (tmp_path / "report.html").read_text(encoding="utf-8")))
    assert "What it can do: wmt" in text and "BLEU" in text and f"{wanted[2]:.4g}" in text
    assert "Right answers" not in text and "Where it was lost" not in text


def test_set_of_which_some_items_are_right_or_wrong_has_both_tables():
    mixed = {}
    for name in ("dense", "cpu"):
        documents = [*report(name)["documents"], *translations([8, 7, 6, 6])["documents"]]
        mixed[name, "abilities"] = {"items": True, "documents": documents, "measures": {}}
    (found,) = item_sets(mixed, "dense", ["cpu"], CHAIN)
    assert [one.name for one in found.abilities] == ["all", "capitals", "sums", "noise"]
    assert found.abilities[0].items == 14
    assert [(one.ability, one.ratios["cpu"].point) for one in found.grades] == [("talk", 1), ("news", 1)]


def test_dense_that_has_nothing_of_a_measure_has_no_ratio():
    nothing = translations([3])
    nothing["documents"][0]["bleu"] = [8, 8, 0, 0, 0, 0, 8, 7, 6, 5]
    (found,) = item_sets({("dense", "wmt"): nothing, ("cpu", "wmt"): translations([8])}, "dense", ["cpu"], CHAIN)
    assert found.grades[0].dense == 0 and found.grades[0].ratios == {"cpu": None}
