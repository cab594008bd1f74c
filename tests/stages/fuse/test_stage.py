import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from flows.recipe.expand import expanded
from flows.recipe.read import read_recipe
from flows.running.plan import resolve
from stages import stage
from stages.fetch import FETCH, FetchParams
from stages.fuse import merging
from stages.fuse.stage import FUSE, FuseParams
from stages.models.checkpoint.loading import load_model
from stages.prune.stage import PRUNE, PruneParams
from stages.quantize.stage import QUANTIZE, QuantizeParams
from stages.runtime.contract import StageError
from stages.runtime.execute import execute
from stages.runtime.progress import Silent
from stages.share import SHARE, ShareParams
from tests.stages.models.families import FAMILIES, answers, family, library

WEIGHTS = "model.safetensors"


def tuned(folder, to, seed, size=0.05):
    """A copy whose weights were changed as by some training."""
    shutil.copytree(folder, to)
    stored = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in stored.items():
        if tensor.is_floating_point():
            stored[name] = (tensor.float() + size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(stored, to / WEIGHTS, {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def three(tiny, tmp_path_factory):
    """The tiny model and two that were trained from it."""
    root = tmp_path_factory.mktemp("tuned")
    return [tiny, tuned(tiny, root / "a", 1), tuned(tiny, root / "b", 2)]


def run(params, models, output, base=None):
    output.mkdir()
    inputs = {f"models.{i}": folder for i, folder in enumerate(models)} | ({"base": base} if base else {})
    metrics = FUSE.run(FuseParams(**params), inputs, output, Silent())
    return metrics, load_file(output / WEIGHTS)


def test_fuse_soup_is_the_mean_of_every_tensor(three, tmp_path):
    metrics, made = run({"weights": [1, 3]}, three[1:], tmp_path / "out")
    a, b = (load_file(folder / WEIGHTS) for folder in three[1:])
    assert made.keys() == a.keys()
    for name, tensor in made.items():
        assert torch.allclose(tensor, (a[name].double() * 0.25 + b[name].double() * 0.75).float(), atol=1e-7)
    assert metrics["changed_tensors"] == len(a)
    assert metrics["parameters"] == sum(tensor.numel() for tensor in a.values())
    rows = {row["tensor"]: row for row in json.loads((tmp_path / "out" / "layers.json").read_text())["layers"]}
    name = "model.layers.2.mlp.up_proj.weight"
    expected = float((made[name] - a[name]).norm() / a[name].norm())
    assert rows[name]["relative_change_of_first"] == pytest.approx(expected, rel=1e-4)
    assert load_model(tmp_path / "out")(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (three[1] / "tokenizer.json").read_bytes()


def test_fuse_slerp_goes_a_quarter_of_the_angle_in_every_tensor(three, tmp_path):
    _, made = run({"method": "slerp", "weights": [3, 1]}, three[:2], tmp_path / "out")
    a, b = (load_file(folder / WEIGHTS) for folder in three[:2])

    def angle(x, y):
        return torch.arccos((x.double().flatten() @ y.double().flatten()) / (x.double().norm() * y.double().norm()))

    for name, tensor in made.items():
        whole = float(angle(a[name], b[name]))
        assert whole > 1e-3
        if abs(float(a[name].norm() / b[name].norm()) - 1) < 1e-3:
            assert float(angle(a[name], tensor)) == pytest.approx(whole / 4, rel=2e-2, abs=1e-6)
        one, other = torch.sin(torch.tensor([0.75, 0.25]).double() * whole) / torch.sin(torch.tensor(whole).double())
        assert torch.allclose(tensor.double(), one * a[name].double() + other * b[name].double(), atol=1e-6)


def ties(base, models, keep, scale):
    """TIES in numpy, of the whole model at once."""
    names = sorted(base)
    flat = lambda stored: torch.cat([stored[name].flatten() for name in names]).double().numpy()  # noqa: E731
    import numpy as np

    start = flat(base)
    changes = np.stack([(flat(one).astype(np.float32) - start.astype(np.float32)).astype(np.float64) for one in models])
    for one in changes:
        bar = np.sort(np.abs(one))[::-1][round(keep * len(one)) - 1]
        one[np.abs(one) < bar] = 0
    sign = np.sign(changes.sum(0))
    agrees = (np.sign(changes) == sign) & (sign != 0)
    merged = (changes * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    made, place = {}, 0
    for name in names:
        size = base[name].numel()
        made[name] = torch.from_numpy(start[place : place + size] + scale * merged[place : place + size])
        place += size
    return made, (merged != 0).mean()


def test_fuse_ties_agrees_with_the_whole_model_in_numpy(three, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "PIECE", 1000)
    metrics, made = run({"method": "ties", "keep": 0.3, "scale": 0.8}, three[1:], tmp_path / "out", base=three[0])
    expected, kept = ties(load_file(three[0] / WEIGHTS), [load_file(one / WEIGHTS) for one in three[1:]], 0.3, 0.8)
    for name, tensor in made.items():
        assert torch.allclose(tensor.flatten().double(), expected[name], atol=1e-6), name
    rows = json.loads((tmp_path / "out" / "layers.json").read_text())["layers"]
    sizes = [made[row["tensor"]].numel() for row in rows]
    found = sum(row["kept_share"] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    assert found == pytest.approx(kept, abs=1e-3)
    assert 0.3 < metrics["mean_sign_conflict_share"] < 0.7


def test_fuse_dare_keeps_rescaled_changes_and_the_same_ones_for_a_seed(three, tmp_path):
    base, a, b = (load_file(folder / WEIGHTS) for folder in three)
    params = {"method": "dare", "keep": 0.25, "weights": [1, 1], "seed": 4}
    _, made = run(params, three[1:], tmp_path / "out", base=three[0])
    name = "model.layers.2.mlp.up_proj.weight"
    change, first, second = (made[name] - base[name]), (a[name] - base[name]) * 2, (b[name] - base[name]) * 2
    near = [torch.isclose(change, one, atol=1e-6) for one in (0 * first, first, second, first + second)]
    assert (near[0] | near[1] | near[2] | near[3]).all()
    assert float(near[1].float().mean()) == pytest.approx(0.25 * 0.75, abs=0.03)
    assert float(near[3].float().mean()) == pytest.approx(0.25**2, abs=0.02)
    run(params, three[1:], tmp_path / "again", base=three[0])
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / "layers.json").read_bytes() == (tmp_path / "out" / "layers.json").read_bytes()
    _, other = run(params | {"seed": 5}, three[1:], tmp_path / "other", base=three[0])
    assert not torch.equal(other[name], made[name])
    _, signed = run(params | {"method": "dare_ties"}, three[1:], tmp_path / "signed", base=three[0])
    both = near[3] & ~near[0] & (first.sign() != second.sign())
    change = signed[name] - base[name]
    larger = torch.where(first.abs() > second.abs(), first, second)
    assert both.any()
    assert torch.allclose(change[both], 2 * larger[both], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_fuse_of_every_family_is_the_mean_and_loads_in_transformers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "load_tokenizer", lambda _folder: FakeTokenizer())
    folder = family(name, tmp_path / "made")
    other = tuned(folder, tmp_path / "other", 3)
    _, made = run({}, [folder, other], tmp_path / "out")
    a, b = (load_file(one / WEIGHTS) for one in (folder, other))
    assert made.keys() == a.keys()
    for key, tensor in made.items():
        assert torch.allclose(tensor, (a[key] + b[key]) / 2, atol=1e-6)
    ours = answers(load_model(tmp_path / "out"))
    assert torch.allclose(ours, answers(library(name, tmp_path / "out")), atol=1e-5)
    assert not torch.allclose(ours, answers(load_model(folder)), atol=1e-3)


class FakeTokenizer:
    def get_vocab(self):
        return {"a": 0}


def test_fuse_keeps_the_stored_type_and_computes_in_float32(tiny, tmp_path):
    folders = []
    for seed in (1, 2, 3):
        folder = tuned(tiny, tmp_path / f"m{seed}", seed)
        stored = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(stored, folder / WEIGHTS, {"format": "pt"})
        folders.append(folder)
    _, made = run({}, folders, tmp_path / "out")
    given = [load_file(folder / WEIGHTS) for folder in folders]
    for name, tensor in made.items():
        assert tensor.dtype == torch.bfloat16
        expected = torch.stack([one[name].double() for one in given]).mean(0)
        assert ((tensor.double() - expected).abs() <= expected.abs() / 256 + 1e-7).all()


def edited(folder, to, change):
    shutil.copytree(folder, to)
    stored = load_file(to / WEIGHTS)
    change(stored)
    save_file(stored, to / WEIGHTS, {"format": "pt"})
    return to


NORM = "model.layers.0.input_layernorm.weight"


def known(*folders):
    return {f"models.{i}": FETCH.admit(FetchParams(source=str(one)), {}) for i, one in enumerate(folders)}


def test_a_cut_checkpoint_is_not_fused_with_the_whole_one(tiny):
    cut = known(tiny, tiny)
    cut["models.1"] = PRUNE.admit(PruneParams(keep=0.8), {"model": cut["models.0"]})
    with pytest.raises(StageError, match="checkpoint 1 is of another architecture than the first: intermediate_size"):
        FUSE.admit(FuseParams(), cut)
    for step, name in (
        (QUANTIZE.admit(QuantizeParams(scheme="int8_weight_only"), {"model": cut["models.0"]}), "quant"),
        (SHARE.admit(ShareParams(), {"model": cut["models.0"], "text": None}), "structure"),
    ):
        with pytest.raises(StageError, match=f"a checkpoint to fuse has a {name}"):
            FUSE.admit(FuseParams(), {**cut, "models.1": step})


def test_fuse_of_unlike_checkpoints_is_refused_by_what_differs(three, tmp_path):
    copy = shutil.copytree(three[1], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for fields, message in (
        ({"rms_norm_eps": 0.5}, r"another architecture than the first: rms_norm_eps differs; measured 0\.5"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures differs"),
    ):
        (copy / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(StageError, match=message):
            merging.check_alike([three[0], copy])
    (copy / "config.json").write_text(
        json.dumps(config | {"eos_token_id": 3, "use_cache": False, "attention_dropout": 0.3})
    )
    merging.check_alike([three[0], copy])
    less = edited(three[1], tmp_path / "less", lambda t: t.pop(NORM))
    with pytest.raises(StageError, match=f"checkpoint 1 is unlike the first in {NORM}; measured absent"):
        merging.check_alike([three[0], less])
    wide = edited(three[1], tmp_path / "wide", lambda t: t.update({NORM: torch.ones(3)}))
    with pytest.raises(
        StageError, match=rf"checkpoint 2 is unlike the first in {NORM}; measured \(3,\); limit \(64,\)"
    ):
        merging.check_alike([three[0], three[1], wide])
    words = json.loads((three[1] / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][1:]
    (copy / "tokenizer.json").write_text(json.dumps(words))
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match="checkpoint 1 has another tokenizer than the first"):
        merging.check_alike([three[0], copy])
    for fields in ({"rms_norm_eps": 0.5}, {}):
        (copy / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(StageError) as work:
            merging.check_alike([three[0], copy])
        with pytest.raises(StageError) as ahead:
            FUSE.admit(FuseParams(), known(three[0], copy))
        assert str(ahead.value) == str(work.value)
    assert FUSE.admit(FuseParams(), known(*three)).task == "generate"


@pytest.mark.parametrize("name", ["structure.json", "quantization.json"])
def test_fuse_of_surgery_is_refused(three, tmp_path, name):
    copy = shutil.copytree(three[1], tmp_path / "copy")
    (copy / name).write_text("{}")
    with pytest.raises(StageError, match=f"a checkpoint to fuse has a {name}"):
        merging.check_alike([three[0], copy])


@pytest.mark.parametrize(
    ("params", "count", "base", "message"),
    [
        ({}, 1, False, "soup cannot fuse so many checkpoints; measured 1; limit 2 or more"),
        ({"method": "slerp"}, 3, False, "slerp cannot fuse so many checkpoints; measured 3; limit 2"),
        ({"weights": [1, 2, 3]}, 2, False, "not one weight a checkpoint; measured 3 weights; limit 2"),
        ({"method": "ties"}, 2, False, "fuse by ties needs an input 'base'"),
        ({"method": "dare"}, 2, False, "fuse by dare needs an input 'base'"),
        ({"method": "soup"}, 2, True, "fuse by soup takes no input 'base'"),
        ({"weights": [1, 0]}, 2, False, "is one of those it was made from; measured 0 of"),
        ({"method": "dare", "scale": 1e38, "keep": 1e-3}, 2, True, "is not finite after fusing"),
    ],
)
def test_fuse_that_cannot_be_done_is_refused(three, tmp_path, params, count, base, message):
    with pytest.raises(StageError, match=message):
        run(params, three[-count:], tmp_path / "out", base=three[0] if base else None)


def test_fuse_of_tables_that_are_no_floats_keeps_them_only_where_equal(three, tmp_path):
    folders = [
        edited(folder, tmp_path / f"t{i}", lambda t, i=i: t.update(table=torch.tensor([1, 2 + i // 2])))
        for i, folder in enumerate(three)
    ]
    fusion = merging.Fusion("soup", (1.0, 1.0), 0.2, 1.0, 0)
    merging.fuse(fusion, folders[:2], None, tmp_path / "same", lambda _d, _t: None)
    assert load_file(tmp_path / "same")["table"].tolist() == [1, 2]
    with pytest.raises(StageError, match="table holds no floats and differs"):
        merging.fuse(fusion, folders[1:], None, tmp_path / "differ", lambda _d, _t: None)


def test_fuse_params_refuse_what_means_nothing():
    for wrong in (
        {"weights": (-1, 2)},
        {"weights": (0, 0)},
        {"keep": 0},
        {"keep": 1.5},
        {"scale": 0},
        {"method": "mean"},
    ):
        with pytest.raises(ValidationError):
            FuseParams(**wrong)


def test_fuse_in_a_recipe_reads_many_steps_in_order_and_is_idempotent(three, store, tmp_path):
    path = tmp_path / "recipe.yaml"
    steps = [f"  - {{name: m{i}, stage: fetch, params: {{source: '{f.as_uri()}'}}}}" for i, f in enumerate(three)]
    fused = (
        "  - {name: fused, stage: fuse, inputs: {models: [m2, m1], base: m0}, params: {method: ties, weights: [1, 3]}}"
    )
    path.write_text("\n".join(["recipe: 1", "name: fusing", "steps:", *steps, fused]) + "\n")
    recipe = read_recipe(path)

    def made(recipe):
        planned = resolve(expanded(recipe).steps, store, lambda _name: Silent())
        for one in planned.values():
            order = one.order
            outcome = execute(stage(order.stage), order.params, order.work, store, Silent(), step=order.step)
        return planned["fused"], outcome

    planned, outcome = made(recipe)
    assert list(outcome.manifest.work.inputs) == ["base", "models.0", "models.1"]
    assert not outcome.cached
    assert planned.after == ("m2", "m1", "m0")
    assert made(recipe)[1].cached
    found = load_file(store.checkout(outcome.identity) / WEIGHTS)
    _, expected = run({"method": "ties", "weights": [1, 3]}, [three[2], three[1]], tmp_path / "out", base=three[0])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    path.write_text(path.read_text().replace("[m2, m1]", "[m1, m2]"))
    other = made(read_recipe(path))[1]
    assert other.identity != outcome.identity
    assert not other.cached


def test_fuse_reads_more_than_ten_checkpoints_in_order(three, tmp_path):
    folders = [three[0]] * 10 + three[1:]
    weights = [0.0] * 10 + [1.0, 3.0]
    _, made = run({"weights": weights}, folders, tmp_path / "many")
    _, two = run({"weights": [1.0, 3.0]}, three[1:], tmp_path / "two")
    assert all(torch.allclose(made[name], tensor, atol=1e-7) for name, tensor in two.items())
