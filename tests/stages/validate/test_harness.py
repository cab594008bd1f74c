"""Tasks of lm-evaluation-harness: what is brought, and what a model is asked, held against torch and the harness."""

import importlib.metadata
import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.recipe.check import faults
from flows.recipe.expand import expanded
from flows.recipe.model import Recipe
from flows.recipe.read import load_recipe
from stages.items.stage import ItemsParams, admit
from stages.measures.items import holds_harness, holds_items
from stages.runtime.contract import StageError
from stages.validate.params import ValidateParams, executed_on

CHOICES = """
task: kinds
dataset_path: json
dataset_kwargs: {data_files: {test: data/kinds.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "The {{thing}} is"
doc_to_choice: ["the same", "a class", "an object of the type"]
target_delimiter: " "
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXTS = """
task: texts
include: base.yaml
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{thing}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
WRITTEN = """
task: written
include: base.yaml
output_type: generate_until
doc_to_text: "The {{thing}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
BASE = "dataset_path: json\ndataset_kwargs: {data_files: {test: data/kinds.jsonl}}\ntest_split: test\n"
THINGS = ("import statement", "value of the object", "class", "name", "method", "function body", "module")


@pytest.fixture(scope="module")
def theirs(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(tiny)


def said(theirs, prompt, new=12):
    model, tokenizer = theirs
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).partition(".")[0]


@pytest.fixture
def folder(tmp_path, theirs):
    made = tmp_path / "tasks"
    (made / "data").mkdir(parents=True)
    for name, text in (("kinds", CHOICES), ("texts", TEXTS), ("written", WRITTEN), ("base", BASE)):
        (made / f"{name}.yaml").write_text(text)
    rows = [
        {"thing": thing, "label": n % 3, "said": said(theirs, f"The {thing}") if n % 2 else "Zanzibar"}
        for n, thing in enumerate(THINGS)
    ]
    (made / "data" / "kinds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (made / "unread.py").write_text("raise SystemExit\n")
    return made


def items(seal, folder, name):
    return seal("items", {"source": str(folder), "harness": name})


def judged(seal, store, tiny, made, **params):
    dense = seal("fetch", {"source": tiny.as_uri()})
    found = seal("validate", {"harness": True} | params, model=dense.identity, text=made.identity)
    return json.loads((store.checkout(found.identity) / "report.json").read_text()), found


def likelihood(theirs, prompt, following):
    model, tokenizer = theirs
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + following, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    return sum(float(logs[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))


def test_task_is_brought_with_its_data_and_without_code(seal, store, folder):
    done = items(seal, folder, "texts")
    made = store.checkout(done.identity)
    assert holds_items(made) and holds_harness(made)
    names = {one.relative_to(made / "harness").as_posix() for one in (made / "harness").rglob("*") if one.is_file()}
    assert names == {"kinds.yaml", "texts.yaml", "written.yaml", "base.yaml", "data/kinds.jsonl"}
    record = json.loads((made / "corpus.json").read_text())["harness"]
    assert record["dataset_kwargs"]["data_files"] == {"test": "data/kinds.jsonl"} and record["test_split"] == "test"
    (folder / "unread.py").write_text("changed")
    assert items(seal, folder, "texts").cached, "what is not taken is no part of it"
    (folder / "data" / "kinds.jsonl").write_text("{}\n")
    assert items(seal, folder, "texts").identity != done.identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHOICES.replace('"{{label}}"', "!function unread.label"), "line 10 calls a function"),
        (CHOICES.replace("path: json", "path: cais/mmlu"), "does not name data that lie beside it"),
        (CHOICES.replace("data/kinds.jsonl", "../kinds.jsonl"), "does not name data that lie beside it"),
        (CHOICES.replace("data/kinds.jsonl", "data/gone.jsonl"), "does not name data that lie beside it"),
        (CHOICES + "include: ../../base.yaml\n", "does not name data that lie beside it"),
        ("- a list", "holds no task"),
        ("a: [", "is not YAML"),
    ],
)
def test_task_that_brings_code_or_reads_elsewhere_is_refused(seal, folder, text, message):
    (folder / "kinds.yaml").write_text(text)
    with pytest.raises(StageError, match=message) as caught:
        items(seal, folder, "kinds")
    assert caught.value.remedy


def test_name_that_no_task_has_is_refused_with_those_that_are_there(seal, folder):
    with pytest.raises(StageError, match="no task 'kind'; measured base, kinds, texts, written"):
        items(seal, folder, "kind")
    with pytest.raises(ValueError, match="columns and abilities of its own"):
        ItemsParams(source="x", harness="kinds", columns={"prompt": "q"})
    with pytest.raises(ValueError, match="of the split test"):
        ItemsParams(source="x", harness="kinds", splits={"validate": 1})


def test_recipe_asks_for_a_task_as_one_and_gates_on_what_it_measures():
    recipe = load_recipe("tiny").model_dump(mode="json", by_alias=True)
    params = {"source": "./tasks", "harness": "kinds"}
    recipe["steps"].append({"name": "kinds", "stage": "items", "inputs": {}, "params": params})
    recipe["judge"] |= {"corpora": [*recipe["judge"]["corpora"], "kinds"], "variants": ["typos"]}
    recipe["gates"].append({"measure": "harness.acc_norm", "corpus": "kinds", "value_at_least": 0.5})
    assert not faults(recipe)
    steps = [one for one in expanded(Recipe.model_validate(recipe)).steps if one.corpus == "kinds"]
    assert steps and all(one.params["harness"] and "variants" not in one.params for one in steps)
    assert admit(ItemsParams(**params), {}).tasks == {"harness"}


def test_harness_that_is_not_installed_is_named_with_the_extra_before_anything_runs(monkeypatch):
    version = importlib.metadata.version

    def hidden(name):
        if name == "lm_eval":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", hidden)
    with pytest.raises(StageError, match=re.escape("enginery[harness]")):
        executed_on(ValidateParams(harness=True))


def test_choices_are_those_that_torch_finds_likeliest(seal, store, tiny, theirs, folder):
    report, done = judged(seal, store, tiny, items(seal, folder, "kinds"))
    choices = (" the same", " a class", " an object of the type")
    acc, norm = [], []
    for n, (thing, one) in enumerate(zip(THINGS, report["documents"], strict=True)):
        sums = [likelihood(theirs, f"The {thing} is", choice) for choice in choices]
        by_length = [score / len(choice.strip()) for score, choice in zip(sums, choices, strict=True)]
        acc.append(int(np.argmax(sums) == n % 3))
        norm.append(int(np.argmax(by_length) == n % 3))
        assert (one["right"], one["harness.acc"], one["harness.acc_norm"]) == (acc[-1], acc[-1], norm[-1])
        assert one["answer"] == choices[int(np.argmax(sums))].strip()
        assert one["expected"] == choices[n % 3].strip() and one["prompt"] == f"The {thing} is"
        assert one["chance"] == pytest.approx(1 / 3)
    assert 0 < sum(acc) < len(acc)
    assert report["measures"]["accuracy"] == report["harness"]["acc"] == pytest.approx(np.mean(acc))
    assert report["measures"]["harness.acc_norm"] == report["harness"]["acc_norm"] == pytest.approx(np.mean(norm))
    assert done.manifest.work.executor["harness"].startswith("lm_eval ")


def test_answers_are_greedy_up_to_where_the_task_says(seal, store, tiny, theirs, folder):
    report, _ = judged(seal, store, tiny, items(seal, folder, "written"))
    for n, (thing, one) in enumerate(zip(THINGS, report["documents"], strict=True)):
        assert one["answer"] == said(theirs, f"The {thing}") and one["right"] == n % 2
    assert report["harness"]["exact_match"] == report["measures"]["accuracy"] == pytest.approx(3 / 7)


def test_whole_texts_cost_what_torch_says(seal, store, tiny, theirs, folder):
    report, _ = judged(seal, store, tiny, items(seal, folder, "texts"))
    model, tokenizer = theirs
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    total = 0.0
    for thing in THINGS:
        ids = torch.tensor([[first, *tokenizer(thing, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        total += sum(float(logs[at - 1, ids[0, at]]) for at in range(1, ids.shape[1]))
    wanted = np.exp(-total / sum(len(thing.encode()) for thing in THINGS))
    assert report["harness"]["byte_perplexity"] == pytest.approx(wanted, rel=1e-5)


def test_figures_are_those_of_the_harness_itself(seal, store, tiny, folder, monkeypatch):
    """Its own evaluation, of its own task, with our model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from stages.models.checkpoint.loading import load_tokenizer
    from stages.serving.engine import open_engine
    from stages.validate.harness import served

    monkeypatch.chdir(folder)  # it looks for data from where it is called
    model = served(open_engine(tiny), load_tokenizer(tiny))
    for name in ("kinds", "written", "texts"):
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        own = simple_evaluate(model=model, tasks=[name], task_manager=manager, bootstrap_iters=0)["results"][name]
        report, _ = judged(seal, store, tiny, items(seal, folder, name))
        for measure, value in report["harness"].items():
            assert own[f"{measure},none"] == pytest.approx(value, rel=1e-6), (name, measure)


def test_parts_come_to_the_same_bytes(seal, store, tiny, folder, tmp_path, monkeypatch):
    from stages.runtime.parts import FOLDER, keep
    from stages.runtime.progress import Silent
    from stages.validate import harness
    from stages.validate.stage import VALIDATE

    monkeypatch.setattr(harness, "TOGETHER", 6)
    made = items(seal, folder, "kinds")
    inputs = {"model": tiny, "text": store.checkout(made.identity)}
    params, whole, parted = ValidateParams(harness=True), tmp_path / "whole", tmp_path / "parted"
    whole.mkdir()
    VALIDATE.run(params, inputs, whole, Silent())
    assert VALIDATE.divided.count(params, inputs) == 4
    keep(parted / FOLDER, range(1, 2), VALIDATE.divided.part(params, inputs, range(1, 2), Silent()))
    keep(parted / FOLDER, range(2, 3), VALIDATE.divided.part(params, inputs, range(3, 4), Silent()))
    VALIDATE.run(params, inputs, parted, Silent())
    assert (parted / "report.json").read_bytes() == (whole / "report.json").read_bytes()


def test_task_that_asks_for_what_is_not_there_is_refused(seal, store, tiny, folder):
    (folder / "kinds.yaml").write_text(CHOICES.replace("metric: acc,", "metric: meteor_of_the_hub,"))
    with pytest.raises(StageError, match="does not know itself: meteor_of_the_hub"):
        judged(seal, store, tiny, items(seal, folder, "kinds"))
    (folder / "kinds.yaml").write_text(CHOICES.replace("test_split: test", "test_split: dev"))
    with pytest.raises(StageError, match="cannot open the task kinds"):
        judged(seal, store, tiny, items(seal, folder, "kinds"))
    with pytest.raises(StageError, match="is a task of lm-evaluation-harness"):
        judged(seal, store, tiny, items(seal, folder, "written"), harness=False)
