"""What happens to runs: odd folders, two at once, a kill, and a name that the registry keeps for itself."""

from __future__ import annotations

import json
import os
import signal

import psutil

from tests.cases.inputs import llama, plain, saved
from tests.cases.place import WINDOWS, Place, Result, Said, awaited, checked, held, judge
from tests.cases.shapes import FIELDS, HEALED

GATES = "gates: [{measure: kl_divergence, at_most: 100}]"
REGISTER = f"register: {{model: case, alias: champion}}\n{GATES}"


def short(model: str = "in/model") -> str:
    """To an engine in few steps."""
    return f"""dense fetch {{source: {model}}}
        text corpus {{source: in/text.txt, {FIELDS}}}
        pruned prune model=dense text=text {{method: channels, keep: 0.9, {WINDOWS}}}
        healed recover model=pruned teacher=dense text=text {{{HEALED}}}
        int8 quantize model=healed text=text {{scheme: int8_w8a8, {WINDOWS}}}
        graph export model=int8 {{parity_tokens: 64}}
        cpu compile graph=graph {{backend: onnxruntime}}"""


def odd_paths(place: Place) -> None:
    """Spaces, accents, other scripts, #, %, brackets in every path: from `init` to the engine in its folder."""
    odd = place.folder / "mes modèles #1 (50%) [v2]"
    saved(llama(), odd / "Été 模型")
    plain(odd / "les notes.txt")
    recipe = place.folder / "mes recettes" / "r é.yaml"
    assert place.enginery("init", odd / "Été 模型", odd / "les notes.txt", "-o", recipe).code == 0
    short_ = "shared.params.windows=4 pruned.params.windows=4 int8.params.windows=4 healed.params.tokens=1024"
    lengths = " ".join(f"{name}.params.window_tokens=64" for name in ("shared", "pruned", "healed", "int8"))
    given = [word for one in f"{short_} {lengths}".split() for word in ("--set", f"steps.{one}")]
    given += ["--set", "judge.window_tokens=64", "--set", "judge.windows=8"]
    out = place.folder / "sortie é"
    said = place.enginery(
        "run", recipe, "--store", place.folder / "magasin été #2 50%", "--output", out, "--json", *given
    )
    assert said.code in (0, 2), said.text[-3000:]  # the template's gates may hold or not: the weights are random
    assert {one.name for one in out.iterdir()} >= {"cpu", "gpu", "report.html", "result.json", "recipe.yaml"}
    assert (out / "cpu" / "model.onnx").is_file() and (out / "cpu" / "engine.json").is_file()
    measured = json.loads((out / "result.json").read_text())
    assert measured["executed"] == ["cpu on onnxruntime:cpu"]


def two_at_once(place: Place) -> None:
    """Two equal runs and another begin at the same moment in one store: all end well, nothing is made twice."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(llama(), source / "model")
    saved(llama(seed=1), source / "other")
    one = place.recipe("a", short(), judge("cpu"), REGISTER)
    two = place.recipe("b", short("in/other"), judge("cpu"), REGISTER)
    runs = [place.start("run", recipe, "--json") for recipe in (one, one, two)]
    spoken = [(run, *run.communicate(timeout=580)) for run in runs]
    first, again, other = (held(checked(Said(run.returncode, out, err, 0))) for run, out, err in spoken)
    made: list[str] = []
    for result in (first, again, other):
        made += [step["fingerprint"] for step in result.data["steps"] if not step["cached"]]
    assert len(made) == len(set(made)), "a step was made twice"
    assert _prints(first) == _prints(again) and _prints(first)["cpu"] != _prints(other)["cpu"]
    assert _prints(first)["text"] == _prints(other)["text"]
    assert {result.data["model"]["version"] for result in (first, again, other)} == {"1", "2"}
    known = json.loads(place.enginery("runs", "--json").out)["runs"]
    assert {line["run"] for line in known} == {result.data["run"] for result in (first, again, other)}
    assert {line["state"] for line in known} == {"passed"}


def reserved_alias(place: Place) -> None:
    """Aliases that MLflow keeps for itself: refused when the recipe is read, where they stand, before any work."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(llama(), source / "model")
    for alias in ("latest", "v1"):
        recipe = place.recipe(alias, short(), judge("cpu"), f"register: {{model: case, alias: {alias}}}\n{GATES}")
        for command in ("plan", "run"):
            said = place.refused(command, recipe)
            assert f"{alias}.yaml:12: register.alias" in said and repr(alias) in said and "allowed" in said, said
        assert place.refused("promote", "case", "1", "--alias", alias)
    assert not (place.folder / "store" / "state" / "runs").exists()
    good = place.enginery("plan", place.recipe("good", short(), judge("cpu"), REGISTER))
    assert good.code == 0, good.err


def killed_and_again(place: Place) -> None:
    """A run that is killed in the middle of a step, without a word: the next goes on, to the very same result."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(llama(), source / "model")
    recipe = place.recipe("a", short(), judge("cpu"), REGISTER)
    log = place.folder / "killed.txt"
    command = place.start("run", recipe, log=log)
    awaited(lambda: "healed: started" in log.read_text() or command.poll() is not None)
    children = psutil.Process(command.pid).children(recursive=True)
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL, log.read_text()
    awaited(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in children), 60)
    again = place.run(recipe, launcher="process")
    assert {name for name in ("dense", "text", "pruned") if again.step(name)["cached"]} == {"dense", "text", "pruned"}
    clean = place.run(recipe, "--store", place.folder / "clean", launcher="process")
    assert not any(step["cached"] for step in clean.data["steps"])
    assert _prints(again) == _prints(clean)
    for measure in ("perplexity", "kl_divergence"):
        assert again.measured(measure, "cpu") == clean.measured(measure, "cpu")
    known = json.loads(place.enginery("runs", "--json").out)["runs"]
    assert sorted(line["state"] for line in known) == ["ended", "passed"]


def _prints(result: Result) -> dict[str, str]:
    return {step["name"]: step["fingerprint"] for step in result.data["steps"]}
