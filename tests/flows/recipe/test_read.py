"""Recipes: what is read, what is refused and how it is said, what is expanded."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from flows.commands.schema import FOLDER, schemas
from flows.recipe.check import check_recipe
from flows.recipe.expand import expanded, target, upstream
from flows.recipe.located_yaml import read_yaml, scalar
from flows.recipe.model import Recipe, RecipeError, Step
from flows.recipe.read import load_recipe, shipped
from flows.running.run_records import as_yaml
from stages import STAGES, stage
from stages.adapters.targets import takes_turns, torch_cuda
from stages.measures.table import MEASURES
from stages.runtime.contract import Kind
from tests.flows.definitions import plain_stages  # noqa: F401

GOOD = """\
recipe: 1
name: small
steps:
  - {name: dense, stage: fetch, params: {source: "pypi://a==1/b"}}
  - {name: text, stage: corpus, params: {source: "pydoc://topics", splits: {train: 0.7, test: 0.3}}}
  - {name: other, stage: corpus, params: {source: "x://y", splits: {test: 1.0}}}
  - {name: shared, stage: share, inputs: {model: dense, text: text}, params: {keep: 0.9}}
  - {name: healed, stage: recover, inputs: {model: shared, teacher: dense, text: text}, params: {tokens: 1e5}}
  - {name: int8, stage: quantize, inputs: {model: healed, text: text}, params: {scheme: int8_w8a8}}
  - {name: graph, stage: export, inputs: {model: int8}}
  - {name: gpu, stage: compile, inputs: {graph: graph}, params: {backend: tensorrt_rtx, architectures: [sm_89, sm_120]}}
  - {name: cpu, stage: compile, inputs: {graph: graph}, params: {backend: onnxruntime}}
judge: {artifacts: [cpu, gpu], baseline: dense, corpora: [text, other]}
gates:
  - {measure: perplexity, against: dense, at_most: 1.25}
  - {measure: size_bytes, artifact: gpu, against: champion, at_most: 200e6}
register: {model: small}
"""

pytestmark = pytest.mark.usefixtures("plain_stages")


def written(tmp_path: Path, text: str = GOOD) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, sets)
    return str(caught.value).splitlines()


def test_recipe_well_formed_is_read_with_defaults_and_numbers(tmp_path):
    recipe = load_recipe(written(tmp_path))
    assert [step.name for step in recipe.steps][:3] == ["dense", "text", "other"]
    assert recipe.step("healed").params == {"tokens": 100_000}
    assert recipe.gates[1].at_most == 200_000_000
    assert recipe.register_as.alias == "champion"
    assert recipe.judge.measures == list(MEASURES)
    assert {"perplexity", "kl_divergence", "top1_agreement"} <= set(recipe.judge.measures)


def test_recipe_written_again_reads_the_same(tmp_path):
    recipe = load_recipe(written(tmp_path))
    assert load_recipe(written(tmp_path, as_yaml(recipe))) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "allowed"),
    [
        ("name: small", "name: small\ncolour: red", 3, "colour", "steps, judge, gates, register"),
        ("recipe: 1", "recipe: 2", 1, "recipe", "1"),
        ("name: small", "name: 4", 2, "name", "valid string"),
        ("stage: share,", "stage: shear,", 7, "steps.shared.stage", "fetch, corpus, fuse, share"),
        ("name: shared, stage", "name: Shared!, stage", 7, "steps.Shared!.name", "pattern"),
        ("params: {keep: 0.9}", "params: {kept: 0.9}", 7, "steps.shared.params.kept", "method, keep"),
        ("params: {keep: 0.9}", "params: {keep: 1.9}", 7, "steps.shared.params.keep", "less than or equal to 1"),
        ("params: {keep: 0.9}", "params: {keep: '0.9'}", 7, "steps.shared.params.keep", "valid number"),
        ("tokens: 1e5", "tokens: 1.5", 8, "steps.healed.params.tokens", "integer"),
        ("params: {scheme: int8_w8a8}", "params: {}", 9, "steps.int8.params.scheme", "required"),
        ("scheme: int8_w8a8", "scheme: int7", 9, "steps.int8.params.scheme", "int8_w8a8"),
        ("inputs: {model: dense, text", "inputs: {model: text, text", 7, "steps.shared.inputs.model", "dense"),
        ("inputs: {model: dense, text", "inputs: {model: int8, text", 7, "steps.shared.inputs.model", "dense"),
        ("inputs: {model: dense, text", "inputs: {model: dance, text", 7, "steps.shared.inputs.model", "dense"),
        ("inputs: {model: dense, text", "inputs: {modle: dense, text", 7, "steps.shared.inputs.modle", "model, text"),
        ("inputs: {model: dense, text", "inputs: {model: [dense], text", 7, "steps.shared.inputs.model", "one step"),
        ("inputs: {model: int8}", "inputs: {}", 10, "steps.graph.inputs", "checkpoint"),
        ("inputs: {model: int8}", "inputs: {model: 3}", 10, "steps.graph.inputs.model", "string"),
        ("inputs: {model: int8}", "input: {model: int8}", 10, "steps.graph.input", "name, stage, inputs, params"),
        ("name: other, stage", "name: text, stage", 6, "steps.text.name", "no other step"),
        ("name: other, stage", "name: champion, stage", 6, "steps.champion.name", "another name"),
        ("artifacts: [cpu, gpu]", "artifacts: [cpu, tpu]", 13, "judge.artifacts.1", "dense"),
        ("artifacts: [cpu, gpu]", "artifacts: [cpu, text]", 13, "judge.artifacts.1", "dense"),
        ("artifacts: [cpu, gpu]", "artifacts: [cpu, cpu]", 13, "judge.artifacts", "each once"),
        ("artifacts: [cpu, gpu]", "artifacts: []", 13, "judge.artifacts", "at least 1"),
        ("baseline: dense", "baseline: graph", 13, "judge.baseline", "dense, shared, healed, int8"),
        ("corpora: [text, other]", "corpora: [text, cpu]", 13, "judge.corpora.1", "text, other"),
        ("corpora: [text, other]", "corpora: [text], split: train", 0, "", ""),
        ("corpora: [text, other]", "corpora: [text, other], split: train", 13, "judge.split", "test"),
        ("corpora: [text, other]", "corpora: [text], measures: [meteor]", 13, "judge.measures.0", "perplexity"),
        ("at_most: 1.25", "at_mots: 1.25", 15, "gates.0.at_mots", "at_most, at_least"),
        (", at_most: 1.25", "", 15, "gates.0", "at_most, at_least"),
        ("at_most: 1.25", "at_most: 1e400", 15, "gates.0.at_most", "finite"),
        ("{measure: perplexity, against: dense", "{measure: speed", 15, "gates.0.measure", "size_bytes"),
        ("against: dense", "against: shared", 15, "gates.0.against", "champion, cpu, dense"),
        ("against: dense", "artifact: gpu", 15, "gates.0.artifact", "cpu"),
        ("against: dense", "corpus: third", 15, "gates.0.corpus", "text, other"),
        ("measure: perplexity, ", "measure: kl_divergence, ", 15, "gates.0.against", "champion, cpu"),
        ("artifact: gpu, ", "artifact: text, ", 16, "gates.1.artifact", "gpu, cpu"),
        ("artifact: gpu, ", "corpus: text, ", 16, "gates.1.corpus", "leave it out"),
        ("against: champion", "against: dance", 16, "gates.1.against", "dense"),
        ("register: {model: small}", "register: {model: 'a/b'}", 17, "register.model", "pattern"),
        ("register: {model: small}", "register: {model: 'a:b'}", 17, "register.model", "pattern"),
        (
            "{model: small}",
            "{model: small, alias: LATEST}",
            17,
            "register.alias",
            "neither `latest` nor `v` and a number",
        ),
        ("{model: small}", "{model: small, alias: v12}", 17, "register.alias", "letters, digits, _ and -"),
        ("{model: small}", "{model: small, alias: 'a b'}", 17, "register.alias", "letters, digits, _ and -"),
        ("{model: small}", "{model: small, alias: ''}", 17, "register.alias", "letters, digits, _ and -"),
        ("{model: small}", "{model: small, alias: Version_1-b}", 0, "", ""),
        ("name: cpu, stage", "name: validate-cpu-text, stage", 0, "", ""),
        ("name: small", "name: small\nname: again", 3, "name", "first on line 2"),
        ("name: small", "name: !!python/object/apply:os.getcwd []", 2, "name", "plain values without tags"),
        ("name: small", "name: !secret small", 2, "name", "plain values without tags"),
        ("name: small", "name: !!str small", 0, "", ""),
        ("name: small", "name: [small", 3, "recipe", "not YAML"),
        ("name: small", "? [a]\n: b", 2, "recipe", "text"),
    ],
)
def test_recipe_with_one_mistake_names_line_field_and_what_is_allowed(tmp_path, old, new, line, field, allowed):
    assert GOOD.count(old) >= 1
    path = written(tmp_path, GOOD.replace(old, new, 1))
    if not line:
        if "validate-cpu-text" not in new:
            load_recipe(path)
        return
    lines = refused(path)
    assert any(one.startswith(f"{path}:{line}: {field}: ") and allowed in one for one in lines), lines


def test_recipe_with_many_mistakes_says_all_of_them_in_the_order_of_the_file(tmp_path):
    text = GOOD.replace("keep: 0.9", "keep: no").replace("tokens: 1e5", "tokenz: 5").replace("model: small", "model: 3")
    lines = refused(written(tmp_path, text))
    assert [int(line.split(":")[1]) for line in lines] == [7, 8, 17]


def test_recipe_with_wrong_kinds_says_each(tmp_path):
    text = GOOD.replace("inputs: {graph: graph}", "inputs: {graph: int8}")
    assert [line.split(": ")[1] for line in refused(written(tmp_path, text))] == [
        "steps.gpu.inputs.graph",
        "steps.cpu.inputs.graph",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_recipe_empty_says_which_keys_it_wants(tmp_path, text):
    assert "empty; allowed: recipe, name, steps" in refused(written(tmp_path, text))[0]


def test_recipe_that_is_a_list_or_binary_is_refused(tmp_path):
    assert "a recipe is a mapping" in refused(written(tmp_path, "- a\n"))[0]
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "allowed: YAML in UTF-8" in refused(binary)[0]
    control = written(tmp_path, "a: \x07\n")
    assert "not YAML" in refused(control)[0]


def test_recipe_that_does_not_exist_lists_the_shipped(tmp_path):
    for source in ("no-such", tmp_path / "none.yaml", tmp_path):
        assert "smollm2-135m, tiny" in refused(source)[0]


def test_recipe_without_steps_judge_or_gates(tmp_path):
    head = "recipe: 1\nname: a\n"
    assert "steps: required" in refused(written(tmp_path, head))[0]
    step = head + "steps: [{name: dense, stage: fetch, params: {source: 'x://y'}}]\n"
    assert [p.name for p in expanded(load_recipe(written(tmp_path, step))).steps] == ["dense"]
    assert "together with `judge`" in refused(written(tmp_path, step + "register: {model: a}\n"))[0]
    assert "needs `judge`" in refused(written(tmp_path, step + "gates: [{measure: perplexity, at_most: 2}]\n"))[0]
    assert "nothing is judged" in refused(written(tmp_path, step + "gates: [{measure: size_bytes, at_most: 2}]\n"))[0]
    sized = step + "gates: [{measure: size_bytes, artifact: dense, at_most: 2}]\n"
    assert load_recipe(written(tmp_path, sized)).gates[0].artifact == "dense"


def test_recipe_whose_step_is_called_like_a_measurement_is_refused(tmp_path):
    text = GOOD.replace("name: other,", "name: validate-cpu-text,").replace("corpora: [text, other]", "corpora: [text]")
    assert "as this measurement would be" in refused(written(tmp_path, text))[0]


def test_recipe_with_anchors_and_merges_is_read(tmp_path):
    text = GOOD.replace("splits: {train: 0.7, test: 0.3}", "splits: &s {train: 0.7, test: 0.3}")
    text = text.replace("splits: {test: 1.0}", "splits: {<<: *s, test: 0.2}")
    recipe = load_recipe(written(tmp_path, text), ["steps.text.params.splits.train=0.6"])
    assert recipe.step("other").params["splits"] == {"train": 0.7, "test": 0.2}
    assert recipe.step("text").params["splits"] == {"train": 0.6, "test": 0.3}


def test_recipe_with_a_list_role_spreads_it(tmp_path):
    text = GOOD.replace("stage: export, inputs: {model: int8}", "stage: export, inputs: {model: both}")
    both = "  - {name: both, stage: fuse, inputs: {models: [int8, healed]}}\n  - {name: graph"
    recipe = load_recipe(written(tmp_path, text.replace("  - {name: graph", both)))
    assert recipe.step("both").roles() == {"models.0": "int8", "models.1": "healed"}
    wrong = text.replace("  - {name: graph", both).replace("[int8, healed]", "int8")
    assert "a list of steps" in refused(written(tmp_path, wrong))[0]


def test_yaml_bombs_and_loops_are_refused_at_once():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "without end" in read_yaml(bomb).faults[0].text
    assert "holds itself" in read_yaml("a: &a [*a]\n").faults[0].text
    assert "`<<` takes" in read_yaml("a: {<<: 3}\n").faults[0].text


words = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn", "Zl", "Zp")), max_size=12)


@example(1e30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
        max_leaves=12,
    )
)
def test_yaml_of_any_json_value_reads_back(value):
    assert read_yaml(json.dumps(value, ensure_ascii=False)).value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("2024-01-02", "2024-01-02"),
        ("1:30", "1:30"),
        ("200e6", 200_000_000),
        ("1e-4", 1e-4),
        ("-.5", -0.5),
        ("0x10", "0x10"),
        ("'1'", "1"),
        ("~", None),
        ("[a, {b: true}]", ["a", {"b": True}]),
        ("", None),
    ],
)
def test_scalar_follows_the_core_schema(text, value):
    found = scalar(text)
    assert (found, type(found)) == (value, type(value))


def test_set_changes_one_value_and_only_it(tmp_path):
    path = written(tmp_path)
    before, after = load_recipe(path), load_recipe(path, ["steps.int8.params.scheme=int4_weight_only"])
    assert after.step("int8").params == {"scheme": "int4_weight_only"}
    assert [s for s in before.steps if s.name != "int8"] == [s for s in after.steps if s.name != "int8"]
    changed = load_recipe(
        path,
        ["gates.0.at_most=2", "judge.split=test", "steps.gpu.params.architectures=[sm_86]", "register.alias=next"],
    )
    assert changed.gates[0].at_most == 2
    assert changed.step("gpu").params["architectures"] == ["sm_86"]
    assert changed.register_as.alias == "next"


def test_set_makes_what_was_left_out(tmp_path):
    text = GOOD.replace("register: {model: small}\n", "").replace(", params: {keep: 0.9}", "")
    recipe = load_recipe(
        written(tmp_path, text), ["register.model=b", "steps.shared.params.keep=0.5", "steps.3.stage=share"]
    )
    assert recipe.register_as.model == "b"
    assert recipe.step("shared").params == {"keep": 0.5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("steps.int9.params.scheme=int8_w8a8", "dense, text, other"),
        ("steps.int8.params.shceme=int8_w8a8", "allowed: scheme"),
        ("steps.int8.parms.scheme=int8_w8a8", "name, stage, inputs, params"),
        ("steps.int8.inputs.modle=dense", "model, text"),
        ("stpes.int8=1", "recipe, name, steps"),
        ("judge.slipt=test", "artifacts, baseline"),
        ("gates.7.at_most=1", "allowed: 0, 1"),
        ("name.first=1", "name=VALUE"),
        ("steps.int8.params.scheme", "PATH=VALUE"),
        ("=3", "PATH=VALUE"),
        ("name=!!python/name:os.system x", "tag"),
        ("name=[", "not YAML"),
    ],
)
def test_set_with_an_unknown_path_or_value_says_what_is_allowed(tmp_path, change, said):
    line = refused(written(tmp_path), change)[0]
    assert line.startswith("--set") and said in line


def test_set_to_a_wrong_value_names_the_option(tmp_path):
    line = refused(written(tmp_path), "steps.int8.params.scheme=int7")[0]
    assert re.search(r"recipe\.yaml:9: steps\.int8\.params\.scheme \(--set\): .*int4_weight_only", line)


def test_source_relative_is_found_beside_the_recipe_then_in_the_working_directory(tmp_path, monkeypatch):
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipes, here):
        (folder / "both").mkdir(parents=True)
    (here / "only").mkdir()
    monkeypatch.chdir(here)
    path = written(recipes, GOOD.replace("pypi://a==1/b", "both").replace("x://y", "file://only"))
    recipe = load_recipe(path)
    assert recipe.step("dense").params["source"] == (recipes / "both").as_uri()
    assert recipe.step("other").params["source"] == (here / "only").as_uri()
    assert recipe.step("text").params["source"] == "pydoc://topics"
    asked = load_recipe(path, ["steps.dense.params.source=both"])
    assert asked.step("dense").params["source"] == (here / "both").as_uri()
    spaced = load_recipe(path, [f"steps.dense.params.source=file://{here}/a%20b"])
    assert spaced.step("dense").params["source"] == (here / "a b").as_uri()


def test_expanded_measures_baseline_and_executable_artifacts_on_each_corpus(tmp_path):
    planned = {p.name: p for p in expanded(load_recipe(written(tmp_path))).steps}
    validated = [name for name in planned if name.startswith("validate-")]
    assert validated == [
        "validate-dense-text",
        "validate-dense-other",
        "validate-cpu-text",
        "validate-cpu-other",
        "validate-shared-text",
        "validate-healed-text",
        "validate-int8-text",
    ]
    cpu = planned["validate-cpu-other"]
    assert cpu.inputs == {"model": "cpu", "text": "other", "baseline": "dense"}
    assert cpu.params == {"split": "test", "window_tokens": 512, "target": "onnxruntime:cpu"}
    assert (cpu.measures, cpu.corpus, cpu.traced) == ("cpu", "other", False)
    dense, traced = planned["validate-dense-text"], planned["validate-int8-text"]
    assert dense.inputs == {"model": "dense", "text": "text"} and dense.params["target"] == "torch:cpu"
    assert traced.inputs == {"model": "int8", "text": "text"} and traced.traced


def test_expanded_with_speed_times_each_executable_artifact_in_turn_with_the_baseline(tmp_path):
    sets = ["judge.speed=true", "judge.artifacts=[cpu, gpu, int8, dense]", "judge.corpora=[other, text]"]
    planned = expanded(load_recipe(written(tmp_path), sets)).steps
    timed = {p.name: p for p in planned if p.measures and p.stage == "bench"}
    assert [p.name for p in planned][-3:] == list(timed) == ["bench-cpu", "bench-int8", "bench-dense"]
    cpu = timed["bench-cpu"]
    assert cpu.inputs == {"artifact": "cpu", "text": "other", "baseline": "dense"}
    assert cpu.params == {"split": "test", "target": "onnxruntime:cpu"}
    assert (cpu.measures, cpu.corpus) == ("cpu", "")
    assert timed["bench-int8"].params["target"] == "torch:cpu"
    assert timed["bench-dense"].inputs == {"artifact": "dense", "text": "other"}
    assert not [p for p in expanded(load_recipe(written(tmp_path))).steps if p.stage == "bench"]


def test_expanded_without_trace_or_with_few_windows(tmp_path):
    recipe = load_recipe(written(tmp_path), ["judge.trace=false", "judge.windows=3", "judge.artifacts=[cpu, int8]"])
    validated = {p.name: p for p in expanded(recipe).steps if p.stage == "validate"}
    assert list(validated) == [f"validate-{a}-{c}" for a in ("dense", "cpu", "int8") for c in ("text", "other")]
    assert {p.params["windows"] for p in validated.values()} == {3}


def test_measurements_whose_names_read_alike_are_two(tmp_path):
    twice = [
        {"name": "cpu-a", "stage": "compile", "inputs": {"graph": "graph"}, "params": {"backend": "onnxruntime"}},
        {"name": "a-text", "stage": "corpus", "params": {"source": "pydoc://topics", "splits": {"test": 1.0}}},
    ]
    data = load_recipe(written(tmp_path)).model_dump(by_alias=True)
    data["steps"] += twice
    data["judge"] |= {"artifacts": ["cpu", "cpu-a"], "corpora": ["text", "a-text"]}
    recipe = Recipe.model_validate(data)
    check_recipe(recipe)
    measured = [step for step in expanded(recipe).steps if step.measures]
    # `cpu` on `a-text` and `cpu-a` on `text` were both called validate-cpu-a-text: a gate read the other's report.
    assert len({step.name for step in measured}) == len(measured)
    by_identity = {(step.measures, step.corpus): step for step in measured}
    assert len(by_identity) == len(measured)
    for (artifact, corpus), step in by_identity.items():
        assert (step.inputs["model"], step.inputs["text"]) == (artifact, corpus)
        alike = step.name != f"validate-{artifact}-{corpus}"
        assert alike == ((artifact, corpus) in {("cpu", "a-text"), ("cpu-a", "text")})


def test_champions_measurement_whose_name_reads_like_another_is_one_more(tmp_path):
    data = load_recipe(written(tmp_path)).model_dump(by_alias=True)
    data["steps"][8]["name"] = "champion-a"
    data["steps"].append({"name": "a-text", "stage": "corpus", "params": {"source": "x://y", "splits": {"test": 1.0}}})
    data["judge"] |= {"artifacts": ["champion-a"], "corpora": ["text", "a-text"]}
    data["gates"] = [{"measure": "perplexity", "against": one, "at_most": 2} for one in ("dense", "champion")]
    recipe = Recipe.model_validate(data)
    check_recipe(recipe)
    asked = expanded(recipe)
    assert len({step.name for step in (*asked.steps, *asked.champion)}) == len(asked.steps) + len(asked.champion)
    champions = {step.corpus: step for step in asked.champion}
    # `champion` on `a-text` would be called as `champion-a` on `text` is.
    assert [one.name for one in champions.values()] == ["validate-champion-text", "validate-champion.a-text"]
    assert champions["a-text"].inputs == {"text": "a-text", "baseline": "dense"}
    assert [step.corpus for step in expanded(_on_text(recipe)).champion] == ["text"]


def _on_text(recipe):
    gates = [one.model_copy(update={"corpus": "text"}) for one in recipe.gates]
    return recipe.model_copy(update={"gates": gates})


def test_step_called_as_a_traced_measurement_is_refused(tmp_path):
    data = load_recipe(written(tmp_path)).model_dump(by_alias=True)
    data["steps"].append({**data["steps"][1], "name": "validate-int8-text"})
    with pytest.raises(RecipeError, match="a step is called 'validate-int8-text' as this measurement would be"):
        check_recipe(Recipe.model_validate(data))


def test_expanded_steps_fit_the_real_definitions(tmp_path):
    recipe = load_recipe(written(tmp_path))
    kinds = {}
    for planned in expanded(recipe).steps:
        definition = stage(planned.stage)
        definition.params.model_validate(planned.params)
        for role, source in planned.inputs.items():
            assert kinds[source] in definition.inputs[role].kinds
        kinds[planned.name] = definition.output
    assert upstream(recipe, "int8") == {"dense", "text", "shared", "healed"}
    gpu, cpu = (recipe.step(name) for name in ("gpu", "cpu"))
    assert target(cpu.stage, cpu.params, "sm_89") == "onnxruntime:cpu" and target(gpu.stage, gpu.params, "") == ""


def test_plan_is_judged_and_timed_where_the_gpu_is_that_it_is_for(tmp_path):
    path = written(tmp_path, GOOD.replace("corpora: [text, other]", "corpora: [text, other], speed: true"))

    def planned(gpu):
        return {one.name: one for one in expanded(load_recipe(path, gpu=gpu), gpu).steps}

    here = planned("sm_120")
    assert here["gpu"].target == "tensorrt_rtx:sm_120" and here["cpu"].target == "onnxruntime:cpu"
    for name in ("validate-gpu-text", "validate-gpu-other", "bench-gpu"):
        assert here[name].params["target"] == "tensorrt_rtx:sm_120"
    assert here["validate-gpu-text"].inputs == {"model": "gpu", "text": "text", "baseline": "dense"}
    assert ("baseline" in here["bench-gpu"].inputs) == takes_turns("tensorrt_rtx:sm_120") == (torch_cuda() != "none")
    for other in ("", "sm_90"):
        there = planned(other)
        assert not there["gpu"].target and not {"validate-gpu-text", "bench-gpu"} & {*there}


def test_what_is_asked_of_a_plan_by_name_is_refused_where_its_gpu_is_not(tmp_path):
    gate = "  - {measure: perplexity, artifact: gpu, against: dense, at_most: 1.2}\nregister:"
    path = written(tmp_path, GOOD.replace("register:", gate))
    assert load_recipe(path, gpu="sm_89").gates[-1].artifact == "gpu"
    with pytest.raises(RecipeError, match="'gpu' is not judged by execution here; allowed: cpu"):
        load_recipe(path, gpu="sm_90")


@pytest.mark.parametrize(
    ("artifact", "asked", "gpu", "wrong"),
    [
        ("gpu", "tensorrt_rtx:sm_89", "sm_89", ""),
        ("gpu", "tensorrt_rtx:sm_89", "", "'gpu' is for sm_89 + sm_120, and no GPU is here"),
        ("gpu", "tensorrt_rtx:sm_89", "sm_90", "and the GPU here is sm_90"),
        ("gpu", "torch:cpu", "sm_120", "'gpu' is not executed on torch:cpu; allowed: tensorrt_rtx:sm_120"),
        ("cpu", "torch:cpu", "", "'cpu' is not executed on torch:cpu; allowed: onnxruntime:cpu"),
        ("int8", "onnxruntime:cpu", "", "allowed: torch:cpu"),
        ("int8", "torch:cuda", "", ""),
    ],
)
def test_step_that_measures_names_what_executes_its_artifact(artifact, asked, gpu, wrong, tmp_path):
    step = f"stage: validate, inputs: {{model: {artifact}, text: text}}, params: {{split: test, target: '{asked}'}}"
    path = written(tmp_path, GOOD.replace("judge:", f"  - {{name: asked, {step}}}\njudge:"))
    if not wrong:
        assert load_recipe(path, gpu=gpu).step("asked")
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, gpu=gpu)
    (line,) = str(caught.value).splitlines()
    assert "steps.asked.params.target" in line and wrong in line


@pytest.mark.parametrize(
    ("scheme", "backend", "architectures", "wrong"),
    [
        ("int4_weight_only", "tensorrt", "[sm_75]", "sm_80 and newer"),
        ("int8_w8a8", "tensorrt", "[sm_75]", ""),
        ("int4_weight_only", "tensorrt", "[sm_89, sm_75]", "sm_80 and newer"),
        ("int4_weight_only", "tensorrt_rtx", "[sm_89]", ""),
        ("int8_w8a8", "tensorrt_rtx", "[sm_75]", "float16"),
        ("fp8", "tensorrt_rtx", "[sm_86]", "sm_89 and newer"),
        ("fp8", "tensorrt_rtx", "[sm_89]", ""),
        ("int8_w8a8", "tensorrt_rtx", "[sm_90]", "backend: tensorrt"),
        ("int8_w8a8", "tensorrt_rtx", "[gpu]", "sm_120"),
        ("int8_w8a8", "tensorrt_rtx", "[]", "sm_120"),
        ("int8_w8a8", "onnxruntime", "[sm_89]", "Remove them"),
    ],
)
def test_precision_that_an_architecture_cannot_have_is_refused(tmp_path, scheme, backend, architectures, wrong):
    path = written(tmp_path)
    sets = [
        f"steps.int8.params.scheme={scheme}",
        f"steps.gpu.params.backend={backend}",
        f"steps.gpu.params.architectures={architectures}",
    ]
    if not wrong:
        load_recipe(path, sets)
        return
    (line,) = refused(path, *sets)
    assert ":11: steps.gpu.params.architectures (--set)" in line and wrong in line and "'int8'" in line


def test_check_of_a_recipe_without_a_file_names_the_field(tmp_path):
    recipe = load_recipe(written(tmp_path))
    check_recipe(recipe)
    data = recipe.model_dump(by_alias=True)
    data["steps"][3]["inputs"]["model"] = "nothing"
    with pytest.raises(RecipeError, match=r"^steps\.shared\.inputs\.model: there is no step 'nothing'"):
        check_recipe(Recipe.model_validate(data))


def test_reading_recipes_imports_nothing_that_computes(tmp_path):
    code = (
        "import sys; from flows.recipe.expand import expanded; from flows.recipe.model import Recipe;"
        "from flows.recipe.read import load_recipe; expanded(load_recipe('smollm2-135m'));"
        "Recipe.model_json_schema();"
        "print([m for m in ('torch', 'mlflow', 'prefect', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


class TestReal:
    """With the stages as they are."""

    @pytest.fixture(autouse=True)
    def plain_stages(self):
        """Nothing is replaced here."""

    @pytest.mark.parametrize("name", shipped())
    def test_shipped_recipe_is_right_and_follows_its_schema(self, name):
        recipe = load_recipe(name)
        assert recipe.name == name
        schema = json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(recipe.model_dump(mode="json", by_alias=True, exclude_unset=True), schema)
        for planned in expanded(recipe).steps:
            stage(planned.stage).params.model_validate(planned.params)

    def test_smollm2_recipe_holds_what_the_main_job_promises(self):
        recipe = load_recipe("smollm2-135m")
        names = {step.name: step for step in recipe.steps}
        assert names["gpu"].params["architectures"] == ["sm_89", "sm_120"]
        limits = {(g.measure, g.artifact, g.against, g.corpus): g.at_most for g in recipe.gates}
        assert limits["perplexity", None, "dense", "text"] == limits["perplexity", None, "dense", "other"] == 1.15
        assert limits["size_bytes", "gpu", "dense", None] == 0.36
        right = next(gate for gate in recipe.gates if gate.measure == "accuracy")
        assert (right.corpus, right.against, right.value_at_least, right.at_least) == ("abilities", "dense", 0.9, 0.85)
        assert [names[one].params["keep"] for one in ("shared", "pruned")] == [0.95, 0.95]

    def test_schemas_are_current(self):
        for name, text in schemas().items():
            assert (FOLDER / name).read_text(encoding="utf-8") == text, "run `python -m flows.commands.schema`"

    def test_schema_refuses_what_the_recipe_refuses(self):
        schema = json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8"))
        data = yaml.safe_load(as_yaml(load_recipe("tiny")))
        jsonschema.validate(data, schema)
        for wrong in ({"stage": "shear"}, {"params": {"kept": 1}}, {"inputs": {"modle": "dense"}}):
            index = next(i for i, step in enumerate(data["steps"]) if step["stage"] == "share")
            steps = [*data["steps"][:index], data["steps"][index] | wrong, *data["steps"][index + 1 :]]
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(data | {"steps": steps}, schema)

    def test_every_stage_has_its_shape_in_the_schema(self):
        schema = json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8"))
        shapes = {shape["title"]: shape["properties"] for shape in schema["$defs"]["Step"]["oneOf"]}
        assert set(shapes) == set(STAGES)
        for name, shape in shapes.items():
            assert set(shape["params"].get("properties", {})) == set(stage(name).params.model_fields)
            assert stage(name).output in Kind


def test_expanded_asks_items_of_all_that_is_judged_and_some_of_the_steps_between(tmp_path):
    plain = load_recipe(written(tmp_path))
    judge = plain.judge.model_copy(
        update={"corpora": [*plain.judge.corpora, "asked"], "trace_items": 50, "variants": ["typos"]}
    )
    items = Step(name="asked", stage="items", params={"source": "abilities://"})
    recipe = plain.model_copy(update={"steps": [*plain.steps, items], "judge": judge})
    found = {step.measures: step for step in expanded(recipe).steps if step.corpus == "asked"}
    others = {step.measures for step in expanded(plain).steps if step.measures}
    assert found.keys() == others, "each that is measured on a text is asked, too"
    for name, step in found.items():
        own = upstream(recipe, name)
        seen = {source for role, source in step.inputs.items() if role.startswith("seen.")}
        if step.traced:
            assert step.params["items"] == 50 and not seen and "baseline" not in step.inputs
            assert "variants" not in step.params, "they take their time"
        else:
            assert "items" not in step.params and "windows" not in step.params
            assert step.params["variants"] == ["typos"]
            assert seen == {one.name for one in recipe.steps if one.stage == "corpus" and one.name in own}
    texts = [step for step in expanded(recipe).steps if step.measures and step.corpus != "asked"]
    assert texts and not any("variants" in step.params for step in texts)
    assert any(step.traced for step in found.values()) and any("seen.0" in step.inputs for step in found.values())
    chain = expanded(recipe).chains["cpu"]
    assert (chain[0], chain[-1]) == (judge.baseline, "cpu")
    assert [name for name in chain[1:-1] if name not in others] == [], "each between is measured"
    assert all(before == judge.baseline or before in upstream(recipe, after) for before, after in pairwise(chain))
