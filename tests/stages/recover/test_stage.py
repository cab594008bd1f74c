import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint import kept_zeros
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.models.text.windows import windows
from stages.recover import headless, pair
from stages.recover.pair import _with_gaps
from stages.recover.params import RecoverParams
from stages.recover.stage import recover
from stages.runtime.contract import PARTIAL, StageError
from stages.runtime.fingerprint import digest_file
from stages.runtime.progress import Silent
from tests.conftest import sealer
from tests.stages.models.grouped import grouped

SHORT = {"window_tokens": 64, "batch_windows": 4, "check_windows": 8, "learning_rate": 1e-3, "warmup_steps": 2}
PARAMS = SHORT | {"tokens": 12 * 256, "check_every_steps": 4}


class Heard(Silent):
    """Keeps what a stage says."""

    def __init__(self):
        self.points, self.notes = [], []

    def metric(self, name, value, step):
        self.points.append((name, value, step))

    def note(self, text):
        self.notes.append(text)

    def steps(self):
        return [step for name, _, step in self.points if name == "kl"]


def damage(folder, source, every=8):
    """Drop an eighth of the inner channels of every block and of the heads' outputs."""
    model = load_model(source)
    with torch.no_grad():
        for block in anatomy.blocks(model):
            for role in ("down", "o"):
                found = anatomy.projections(block)[role]
                getattr(found, "basis", found).weight[:, ::every] = 0
    save_model(model, folder, like=source)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tiny, shared_store, topics):
    """Inputs of the stage: a damaged model, the original, its text."""
    damaged = damage(tmp_path_factory.mktemp("damaged") / "model", tiny)
    return {"model": damaged, "teacher": tiny, "text": shared_store.checkout(topics)}


@pytest.fixture(scope="session")
def undisturbed(folders, tmp_path_factory):
    """Output folder, metrics and what was heard of one whole run."""
    output, heard = tmp_path_factory.mktemp("recover") / "out", Heard()
    metrics = recover(RecoverParams(**PARAMS), folders, output, heard)
    return output, metrics, heard


def sealed(folder):
    return {p.name: digest_file(p) for p in sorted(folder.iterdir()) if p.is_file()}


@torch.no_grad()
def kl(teacher, folder, text):
    ids_NT = windows(text, "test", load_tokenizer(teacher), 64, most=48)
    p, q = (load_model(one)(input_ids=ids_NT).logits.log_softmax(-1) for one in (teacher, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_recover_comes_nearer_to_the_teacher_on_text_it_never_saw(undisturbed, folders):
    output, metrics, _ = undisturbed
    before, after = (kl(folders["teacher"], one, folders["text"]) for one in (folders["model"], output))
    assert after < 0.6 * before
    assert metrics["kl_after"] < 0.6 * metrics["kl_before"]
    assert metrics["steps"] == 12
    assert metrics["tokens"] == 12 * 256


def test_recover_reports_the_divergence_that_is_there(undisturbed, folders):
    _, metrics, _ = undisturbed
    ids_NT = windows(folders["text"], "validate", load_tokenizer(folders["teacher"]), 64, most=8)
    with torch.no_grad():
        p, q = (load_model(folders[r])(input_ids=ids_NT).logits.double().log_softmax(-1) for r in ("teacher", "model"))
        expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert metrics["kl_before"] == pytest.approx(float(expected), rel=0.1)  # heads and states in bfloat16


def test_recover_changes_blocks_and_leaves_the_table(undisturbed, folders):
    old, new = (dict(load_model(one).named_parameters()) for one in (folders["model"], undisturbed[0]))
    assert old.keys() == new.keys()
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {"model.embed_tokens.weight"}
    assert undisturbed[1]["changed_tensors"] == len(old) - 1


@pytest.fixture(scope="module")
def reward(tiny, tmp_path_factory):
    """The tiny model with a head that gives a text one number."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    made = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    made.config.pad_token_id = None
    made.score.weight.data.normal_(0, 0.3)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return folder


def test_recover_brings_the_numbers_of_a_decoder_that_scores_nearer_to_the_teachers(reward, folders, tmp_path):
    inputs = folders | {"model": damage(tmp_path / "damaged", reward, every=3), "teacher": reward}
    # One answer a window: it takes many short ones.
    how = {"window_tokens": 32, "batch_windows": 16, "check_windows": 32, "check_every_steps": 6, "learning_rate": 3e-4}
    metrics = recover(RecoverParams(**how, tokens=24 * 512), inputs, tmp_path / "out", Heard())
    ids_NT = windows(folders["text"], "test", load_tokenizer(reward), 32, most=64)
    with torch.no_grad():
        plain = LlamaForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
        wanted_N = torch.cat([plain(input_ids=ids).logits for ids in ids_NT.split(1)])
        gaps = [
            torch.cat([load_model(one)(input_ids=ids).logits for ids in ids_NT.split(1)]) - wanted_N
            for one in (inputs["model"], tmp_path / "out")
        ]
    errors = [float(gap_N.square().mean() / wanted_N.var() / 2) for gap_N in gaps]
    assert errors[1] < 0.6 * errors[0]
    assert metrics["kl_after"] < 0.6 * metrics["kl_before"]
    assert metrics["kl_before"] == pytest.approx(errors[0], rel=0.5)  # by windows of another split


def test_teacher_that_gives_every_text_the_same_number_is_refused(reward, folders, tmp_path):
    made = load_model(reward)
    made.score.weight.data.zero_()
    save_model(made, tmp_path / "same", like=reward)
    with pytest.raises(StageError, match=r"gives every window the same number.*a spread of 0 over 32 windows"):
        recover(
            RecoverParams(**PARAMS), folders | dict.fromkeys(("model", "teacher"), tmp_path / "same"), tmp_path, Heard()
        )


def test_masked_models_fill_seeded_gaps_in_every_text():
    class Tokenizer:
        mask_token_id = 3

        def __call__(self, _text, add_special_tokens=True):
            return {"input_ids": [1, 5, 2] if add_special_tokens else [5]}

    ids_NT, heard = torch.arange(4, 4004).view(40, 100), Heard()
    train, judged = _with_gaps(Tokenizer(), ids_NT, {"text": ids_NT}, 7, heard)
    again, _ = _with_gaps(Tokenizer(), ids_NT, {}, 7, heard)
    other, _ = _with_gaps(Tokenizer(), ids_NT, {}, 8, heard)
    for found in (train, judged["text"]):
        hidden = found == 3
        assert 0.13 < float(hidden.float().mean()) < 0.17
        assert not hidden[:, 0].any() and not hidden[:, -1].any()  # what the tokenizer adds
        assert torch.equal(found[~hidden], ids_NT[~hidden])
    assert torch.equal(train, again)
    assert not torch.equal(train, other) and not torch.equal(train, judged["text"])
    Tokenizer.mask_token_id = None
    assert _with_gaps(Tokenizer(), ids_NT, {}, 7, heard)[0] is ids_NT
    assert heard.notes == ["the tokenizer has no mask token: student and teacher read whole windows"]


def test_recover_draws_curves(undisturbed):
    _, metrics, heard = undisturbed
    assert heard.steps() == list(range(1, 13))
    held = [(value, step) for name, value, step in heard.points if name == "kl_text_held_out"]
    assert [step for _, step in held] == [0, 4, 8, 12]
    assert held[0][0] == metrics["kl_before"]
    assert min(held)[0] == metrics["kl_after"]


def test_recover_learns_from_the_train_split_alone(undisturbed, folders, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.jsonl").write_bytes((folders["text"] / "train.jsonl").read_bytes())
    (text / "validate.jsonl").write_bytes((folders["text"] / "test.jsonl").read_bytes())
    heard = Heard()
    recover(RecoverParams(**PARAMS), folders | {"text": text}, tmp_path / "out", heard)
    curves = [[value for name, value, _ in one.points if name == "kl"] for one in (undisturbed[2], heard)]
    assert curves[0] == curves[1]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("at", "first"), [(2, 1), (6, 5), (8, 9), (11, 9)])
def test_recover_interrupted_goes_on_from_the_last_save_to_the_same_bytes(undisturbed, folders, tmp_path, at, first):
    class Stopper(Heard):
        def metric(self, name, value, step):
            super().metric(name, value, step)
            if name == "kl" and step == at + 1:
                raise Stopped

    output = tmp_path / "out"
    with pytest.raises(Stopped):
        recover(RecoverParams(**PARAMS), folders, output, Stopper())
    heard = Heard()
    metrics = recover(RecoverParams(**PARAMS), folders, output, heard)
    assert heard.steps() == list(range(first, 13))
    assert sealed(output) == sealed(undisturbed[0])
    assert metrics == undisturbed[1]


@pytest.mark.fault
def test_recover_killed_goes_on_to_the_same_bytes(undisturbed, folders, tmp_path):
    script = """
import os, json, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[3]))
from stages.recover import headless, pair
from stages.recover.pair import _with_gaps
from stages.recover.params import RecoverParams
from stages.recover.stage import recover
from stages.runtime.progress import Silent
class Killer(Silent):
    def metric(self, name, value, step):
        if name == "kl" and step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
order = json.loads(sys.argv[1])
recover(RecoverParams(**order["params"]), {k: Path(v) for k, v in order["inputs"].items()}, Path(sys.argv[2]), Killer())
"""
    order = json.dumps({"params": PARAMS, "inputs": {role: str(path) for role, path in folders.items()}})
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, order, str(output), str(torch.get_num_threads())],
        cwd=Path(__file__).parents[3],
        env=os.environ,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (output / "model.safetensors").exists()
    heard = Heard()
    recover(RecoverParams(**PARAMS), folders, output, heard)
    assert heard.steps() == list(range(5, 13))
    assert sealed(output) == sealed(undisturbed[0])


def test_recover_keeps_no_more_state_than_it_needs(undisturbed):
    names = sorted(p.name for p in (undisturbed[0] / PARTIAL).iterdir())
    assert names == ["best-12.safetensors", "state.safetensors", "teacher"]


def test_recover_keeps_the_best_state_and_stops_when_it_gets_no_better(folders, tmp_path):
    heard = Heard()
    rate = {"learning_rate": 0.03, "warmup_steps": 60, "tokens": 120 * 256, "check_every_steps": 2, "patience": 2}
    metrics = recover(RecoverParams(**SHORT | rate), folders, tmp_path / "out", heard)
    held = [(value, step) for name, value, step in heard.points if name == "kl_text_held_out"]
    assert min(held) == (metrics["kl_after"], metrics["best_step"])
    assert metrics["steps"] == metrics["best_step"] + 4 < 120
    assert metrics["kl_text_after"] == metrics["kl_after"]


@pytest.mark.parametrize("update", ["full", "lora"])
def test_recover_of_what_lost_next_to_nothing_leaves_the_weights_and_says_so(folders, tmp_path, update):
    model = load_model(folders["teacher"])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1.001
    save_model(model, tmp_path / "near", like=folders["teacher"])
    heard = Heard()
    params = RecoverParams(
        **SHORT | {"learning_rate": 0.3, "warmup_steps": 0, "tokens": 4 * 256, "check_every_steps": 2, "update": update}
    )
    metrics = recover(params, folders | {"model": tmp_path / "near"}, tmp_path / "out", heard)
    assert metrics["changed_tensors"] == metrics["best_step"] == 0
    assert metrics["kl_after"] == metrics["kl_before"] == pytest.approx(metrics["kl_text_after"], rel=1e-3)
    assert any("the weights stay as they came" in note for note in heard.notes)
    new, old = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "near"))
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_recover_that_does_not_help_is_refused(folders, tmp_path, monkeypatch):
    import stages.recover.loop

    monkeypatch.setattr(stages.recover.loop, "LITTLE", 0.0)
    params = RecoverParams(
        **SHORT | {"learning_rate": 0.3, "warmup_steps": 0, "tokens": 4 * 256, "check_every_steps": 2}
    )
    with pytest.raises(StageError, match=r"did not help.*before.*Lower"):
        recover(params, folders, tmp_path / "out", Silent())
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("at", "back"), [(3, 0), (7, 4)])
def test_recover_from_a_loss_that_is_nan_steps_back_and_halves_the_rate(folders, tmp_path, monkeypatch, at, back):
    import stages.recover.loop

    real, calls = stages.recover.loop.student.learn, []

    def learn(made, chosen, rate):
        calls.append(rate)
        if len(calls) == at:
            with torch.no_grad():
                next(iter(made.updates.computing.values())).fill_(float("nan"))
        return real(made, chosen, rate)

    monkeypatch.setattr(stages.recover.loop.student, "learn", learn)
    heard = Heard()
    metrics = recover(RecoverParams(**PARAMS), folders, tmp_path / "out", heard)
    assert any(f"back to step {back} at half" in note for note in heard.notes)
    assert calls[at] == pytest.approx(calls[back] / 2)
    assert metrics["steps"] == 12
    assert metrics["kl_after"] < metrics["kl_before"]


def test_recover_from_a_second_nan_is_an_error_with_the_loss(folders, tmp_path, monkeypatch):
    import stages.recover.loop

    monkeypatch.setattr(stages.recover.loop.student, "learn", lambda made, chosen, rate: float("nan"))
    with pytest.raises(StageError, match=r"left its course at step 1, again.*loss nan.*Lower"):
        recover(RecoverParams(**PARAMS), folders, tmp_path / "out", Silent())


@pytest.mark.parametrize(
    ("loss", "expected"), [(float("nan"), True), (float("inf"), True), (4.1, True), (3.9, False), (0.1, False)]
)
def test_a_jump_is_a_loss_far_above_the_median_of_the_last(loss, expected):
    from stages.recover.loop import jumped

    assert jumped(loss, [1.0, 0.9, 1.1, 1.0, 1.0, 1.2, 0.8, 1.0]) is expected
    assert jumped(4.1, [1.0]) is False
    # Of next to nothing any factor may be one window that the teacher is not sure of.
    assert [jumped(loss, [0.006] * 16, 16.0) for loss in (0.21, 1.5, 1.7)] == [False, False, True]


def test_recover_judges_by_both_texts_when_another_is_given(folders, tmp_path):
    heard = Heard()
    metrics = recover(RecoverParams(**PARAMS), folders | {"other": folders["text"]}, tmp_path / "out", heard)
    assert metrics["kl_after"] == pytest.approx((metrics["kl_text_after"] + metrics["kl_other_after"]) / 2)
    assert {"kl_text_held_out", "kl_other_held_out"} <= {name for name, *_ in heard.points}


@torch.no_grad()
def likelihood(folder, text):
    ids_NT = windows(text, "validate", load_tokenizer(folder), 64, most=8)
    return float(load_model(folder)(input_ids=ids_NT, labels=ids_NT).loss)


def test_recover_that_learns_the_text_is_judged_by_the_text_as_well_as_by_the_teacher(folders, tmp_path):
    heard = Heard()
    params = {"kl_weight": 0.25, "tokens": 24 * 256, "check_every_steps": 2, "patience": 99, "learning_rate": 0.01}
    metrics = recover(RecoverParams(**PARAMS | params), folders, tmp_path / "out", heard)
    points = {(name, step): value for name, value, step in heard.points}
    steps = [step for name, _, step in heard.points if name == "excess_text_held_out"]
    score = {s: 0.25 * points["kl_text_held_out", s] + 0.75 * points["excess_text_held_out", s] for s in steps}
    assert metrics["best_step"] == min(score, key=score.get)
    assert metrics["excess_text_after"] == points["excess_text_held_out", metrics["best_step"]]
    assert metrics["kl_after"] == points["kl_text_held_out", metrics["best_step"]]
    gap = likelihood(tmp_path / "out", folders["text"]) - likelihood(folders["teacher"], folders["text"])
    assert metrics["excess_text_after"] == pytest.approx(gap * 63 / 64, abs=0.02)  # heads and states in bfloat16


def test_recover_keeps_bases_and_ties_shared(folders, tmp_path):
    model = damage(tmp_path / "cut", grouped(folders["teacher"], tmp_path / "grouped"))
    metrics = recover(RecoverParams(**PARAMS), folders | {"model": model}, tmp_path / "out", Silent())
    assert metrics["kl_after"] < metrics["kl_before"]
    layers = load_model(tmp_path / "out").model.layers
    assert layers[1].mlp.down_proj.basis is layers[2].mlp.down_proj.basis
    assert layers[3].self_attn.v_proj.weight is layers[4].self_attn.v_proj.weight
    assert (tmp_path / "out" / "structure.json").read_bytes() == (model / "structure.json").read_bytes()
    sizes = [(one / "model.safetensors").stat().st_size for one in (model, tmp_path / "out")]
    assert sizes[0] == sizes[1]


def zeroed(folder, source):
    """Half of the weights of every down map are zero."""
    model = load_model(source)
    with torch.no_grad():
        for block in anatomy.blocks(model):
            w_OI = anatomy.projections(block)["down"].weight
            w_OI[w_OI.abs() < w_OI.abs().median()] = 0
    save_model(model, folder, like=source)
    return folder


def test_recover_sparse_keeps_the_zeros_and_what_counts_them(folders, tmp_path):
    model = zeroed(tmp_path / "cut", folders["teacher"])
    weights = {name: one for name, one in load_model(model).named_parameters() if "down" in name}
    kept_zeros.save(load_model(model), weights, model)
    counted = (model / "zeros.json").read_bytes()
    metrics = recover(
        RecoverParams(**PARAMS | {"update": "sparse"}), folders | {"model": model}, tmp_path / "out", Silent()
    )
    assert metrics["kl_after"] < metrics["kl_before"]
    old, new = (dict(load_model(one).named_parameters()) for one in (model, tmp_path / "out"))
    zeros = [((old[name] == 0).sum().item(), (new[name] == 0).sum().item()) for name in old if "down" in name]
    assert all(a == b > 0 for a, b in zeros)
    assert (tmp_path / "out" / "zeros.json").read_bytes() == counted
    assert metrics["zeros"] == metrics["zeros_before"] == sum(int((one == 0).sum()) for one in weights.values())


@pytest.mark.parametrize("update", ["full", "lora"])
def test_recover_that_would_fill_counted_zeros_is_refused(folders, tmp_path, update):
    model = zeroed(tmp_path / "cut", folders["teacher"])
    kept_zeros.save(load_model(model), ["model.layers.0.mlp.down_proj.weight"], model)
    with pytest.raises(StageError, match=rf"update: {update}. would fill the zeros.*update: sparse"):
        recover(RecoverParams(update=update), folders | {"model": model}, tmp_path / "out", Silent())


def test_recover_lora_is_merged_and_resumes_to_the_same_bytes(folders, tmp_path):
    params = RecoverParams(**PARAMS | {"update": "lora", "rank": 4, "learning_rate": 5e-3})

    class Stopper(Heard):
        def metric(self, name, value, step):
            if name == "kl" and step == 7:
                raise Stopped

    with pytest.raises(Stopped):
        recover(params, folders, tmp_path / "cut-off", Stopper())
    outputs = [tmp_path / name for name in ("cut-off", "whole")]
    metrics = [recover(params, folders, output, Silent()) for output in outputs]
    assert sealed(outputs[0]) == sealed(outputs[1])
    assert metrics[0] == metrics[1]
    assert metrics[0]["kl_after"] < metrics[0]["kl_before"]
    old, new = (dict(load_model(one).named_parameters()) for one in (folders["model"], outputs[1]))
    ranks = {name: int(torch.linalg.matrix_rank(new[name] - old[name], rtol=1e-3)) for name in old if "proj" in name}
    assert set(ranks.values()) == {4}
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(ranks)


def test_recover_says_how_far_each_tensor_moved(undisturbed, folders):
    layers = json.loads((undisturbed[0] / "layers.json").read_text())["layers"]
    old, new = (dict(load_model(one).named_parameters()) for one in (folders["model"], undisturbed[0]))
    assert [row["tensor"] for row in layers] == list(old)
    for row in layers:
        before, after = (one[row["tensor"]].detach().double().numpy() for one in (old, new))
        expected = ((after - before) ** 2).sum() ** 0.5 / (before**2).sum() ** 0.5
        assert row["relative_change"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("number", [torch.bfloat16, torch.float32])
def test_recover_by_hidden_states_as_well_comes_nearer_in_either_float(folders, tmp_path, monkeypatch, number):
    from stages.prune.depth import drop_blocks

    for module in (headless, pair):
        monkeypatch.setattr(module, "SHORT", number)
    model = load_model(folders["model"])
    drop_blocks(model, [3])
    save_model(model, tmp_path / "cut", like=folders["teacher"])
    metrics = recover(
        RecoverParams(**PARAMS | {"hidden_weight": 0.5, "accumulate": 2, "written_windows": 4}),
        folders | {"model": tmp_path / "cut"},
        tmp_path / "out",
        Silent(),
    )
    assert metrics["kl_after"] < 0.7 * metrics["kl_before"]


def test_recover_from_a_wider_teacher_learns_from_its_tokens_alone_and_says_so(folders, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folders["teacher"])
    config.hidden_size = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    load_tokenizer(folders["teacher"]).save_pretrained(tmp_path / "narrow")
    heard = Heard()
    metrics = recover(RecoverParams(**PARAMS), folders | {"model": tmp_path / "narrow"}, tmp_path / "out", heard)
    assert metrics["kl_after"] < metrics["kl_before"]
    assert any("of another width" in note for note in heard.notes)


def test_budget_in_minutes_becomes_tokens_before_anything_runs():
    made = RecoverParams(tokens="20 min at 850/s")
    assert made.tokens == 1_020_000
    assert made == RecoverParams(tokens=1_020_000)
    assert RecoverParams(tokens="0.5 min at 100/s").tokens == 3000
    with pytest.raises(ValueError, match="tokens"):
        RecoverParams(tokens="20 min")


def test_recover_tells_the_rate_that_a_budget_in_minutes_needs(undisturbed):
    said = [note for note in undisturbed[2].notes if "tokens a second" in note]
    assert len(said) == 1
    budget = re.search(r"`tokens: (.+)`", said[0])[1]
    assert RecoverParams(tokens=budget).tokens > 0


def test_recover_on_text_shorter_than_a_window_is_refused(folders, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.jsonl").write_text(json.dumps({"id": "0", "text": "Too short."}) + "\n")
    with pytest.raises(StageError, match=r"'train' is shorter than one window.*64 tokens"):
        recover(RecoverParams(**PARAMS), folders | {"text": text}, tmp_path / "out", Silent())


def test_recover_from_a_quantized_teacher_is_refused(folders, tmp_path):
    teacher = shutil.copytree(folders["teacher"], tmp_path / "teacher")
    (teacher / "quantization.json").write_text("{}")
    with pytest.raises(StageError, match="quantized checkpoint cannot teach"):
        recover(RecoverParams(**PARAMS), folders | {"teacher": teacher}, tmp_path / "out", Silent())


def test_recover_twice_by_the_same_recipe_hits(shared_store, folders, dense, topics):
    model = sealer(shared_store)("fetch", {"source": folders["model"].as_uri()}).identity
    runs = [sealer(shared_store)("recover", PARAMS, model=model, teacher=dense, text=topics) for _ in range(2)]
    assert [run.cached for run in runs] == [False, True]
    assert PARTIAL not in {Path(name).parts[0] for name in runs[0].manifest.files}


def test_recover_from_a_teacher_of_another_vocabulary_is_refused(folders, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folders["teacher"])
    config.vocab_size = 800
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    load_tokenizer(folders["teacher"]).save_pretrained(tmp_path / "teacher")
    with pytest.raises(StageError, match=r"same tokens.*800.*768"):
        recover(RecoverParams(**PARAMS), folders | {"teacher": tmp_path / "teacher"}, tmp_path / "out", Silent())


def test_recover_of_a_quantized_checkpoint_is_refused(shared_store, folders, dense, topics):
    quantized = sealer(shared_store)("quantize", {"scheme": "int8_weight_only"}, model=dense).identity
    names = sorted(name for name, _ in shared_store.manifests())
    with pytest.raises(StageError, match=r"quantized checkpoint cannot learn.*before `quantize`"):
        sealer(shared_store)("recover", PARAMS, model=quantized, teacher=dense, text=topics)
    assert sorted(name for name, _ in shared_store.manifests()) == names


def test_recover_that_wrote_what_it_read_is_refused(folders, tmp_path, monkeypatch):
    import stages.models.checkpoint.loading
    import stages.recover.student

    def unchanged(model, folder, *, like, **how):
        return save_model(load_model(like), folder, like=like, **how)

    monkeypatch.setattr(stages.models.checkpoint.loading, "save_model", unchanged)
    with pytest.raises(StageError, match="changed no tensor"):
        recover(RecoverParams(**PARAMS), folders, tmp_path / "out", Silent())


def test_recover_sparse_that_wrote_filled_zeros_is_refused(folders, tmp_path, monkeypatch):
    import stages.models.checkpoint.loading

    def filling(model, folder, **how):
        with torch.no_grad():
            for block in anatomy.blocks(model):
                anatomy.projections(block)["down"].weight += 1e-3
        return save_model(model, folder, **how)

    model = zeroed(tmp_path / "cut", folders["teacher"])
    monkeypatch.setattr(stages.models.checkpoint.loading, "save_model", filling)
    params = RecoverParams(**PARAMS | {"update": "sparse"})
    with pytest.raises(StageError, match=r"down_proj.weight lost zeros that had to stay"):
        recover(params, folders | {"model": model}, tmp_path / "out", Silent())
