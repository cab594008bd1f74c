"""Encoder-decoders through the stages that run a model over text: the pairs are the text and what the model answers."""

import json
import shutil

import pytest
import torch
import transformers

from stages.factorize import FACTORIZE
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.tasks import answer, task_of
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.models.text.decoder_answers import answered
from stages.models.text.windows import windows
from stages.prune.stage import PRUNE
from stages.quantize.stage import QUANTIZE
from stages.recover.params import RecoverParams
from stages.recover.stage import recover
from stages.runtime.contract import PARTIAL, StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import FAMILIES
from tests.stages.recover.test_stage import SHORT, Heard, damage, sealed

LEARN = SHORT | {"tokens": 24 * 128, "window_tokens": 32, "check_every_steps": 4, "patience": 9}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny, shared_store, topics):
    """A BART and a T5 that read the tiny model's tokens, and their text."""
    found = {"text": shared_store.checkout(topics)}
    for name in ("bart", "t5"):
        made, config, settings = FAMILIES[name]
        torch.manual_seed(5)
        vocabulary = len(load_tokenizer(tiny))
        ends = {"eos_token_id": load_tokenizer(tiny).eos_token_id}
        model = getattr(transformers, made)(getattr(transformers, config)(vocab_size=vocabulary, **settings | ends))
        with torch.no_grad():
            for parameter in model.parameters():  # answers that are neither flat nor one token for ever
                by = 3 if name == "bart" and parameter.dim() == 2 else 1
                parameter.mul_(by).add_(torch.randn_like(parameter) * (0.05 if name == "bart" else 0.02))
        found[name] = tmp_path_factory.mktemp(name) / "model"
        model.save_pretrained(found[name])
        for file in tiny.glob("tokenizer*"):
            shutil.copyfile(file, found[name] / file.name)
    return found


@torch.no_grad()
def kl(teacher, folder, text, tmp_path):
    """Of the answers to windows that no stage saw."""
    whole = load_model(teacher)
    ids_NS = windows(text, "test", load_tokenizer(teacher), 32, most=24)
    answers_NS = answered(whole, ids_NS, tmp_path / "judged.safetensors")
    read = {"input_ids": ids_NS, "decoder_input_ids": answers_NS.clamp_min(0)}
    p, q = (one(**read).logits.log_softmax(-1) for one in (whole, load_model(folder)))
    return float((p.exp() * (p - q)).sum(-1)[answers_NS >= 0].mean())


def run(stage, params, inputs, output):
    output.mkdir()
    return stage.run(stage.params(**params), inputs, output, Silent())


FITTED = {
    "int4": (QUANTIZE, {"scheme": "int4_weight_only", "block": 8, "embedding": "keep"}, {"search": "off"}),
    "2:4": (PRUNE, {"method": "sparsegpt", "pattern": "2:4"}, {"method": "magnitude"}),
}


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("what", FITTED)
def test_maps_of_both_stacks_are_fitted_to_what_the_model_answers(folders, tmp_path, name, what):
    stage, params, plainly = FITTED[what]
    inputs = {"model": folders[name], "text": folders["text"]}
    size = {"windows": 24, "window_tokens": 64}
    run(stage, params | size, inputs, tmp_path / "fitted")
    run(stage, params | size | plainly, inputs, tmp_path / "plain")
    rows = json.loads((tmp_path / "fitted" / "layers.json").read_text())["layers"]
    model = load_model(folders[name])
    assert len(rows) == sum(len(anatomy.maps(block)) for block in anatomy.blocks(model))
    lost = [kl(folders[name], tmp_path / one, folders["text"], tmp_path) for one in ("fitted", "plain")]
    assert lost[0] < 0.8 * lost[1], lost


@pytest.mark.parametrize(
    "params", [{"scheme": "fp8_e4m3"}, {"scheme": "nvfp4"}, {"scheme": "auto", "bits": 6.0, "block": 8}]
)
def test_other_schemes_take_both_stacks(folders, tmp_path, params):
    inputs = {"model": folders["bart"], "text": folders["text"]}
    run(QUANTIZE, params | {"window_tokens": 32, "windows": 6, "embedding": "keep"}, inputs, tmp_path / "out")
    assert kl(folders["bart"], tmp_path / "out", folders["text"], tmp_path) < 0.1


@pytest.fixture(scope="module", params=["bart", "t5"])
def recovered(request, folders, tmp_path_factory):
    """Inputs, output and metrics of one whole run of `recover`."""
    root = tmp_path_factory.mktemp("recover")
    damaged = damage(root / "damaged", folders[request.param])
    inputs = {"model": damaged, "teacher": folders[request.param], "text": folders["text"]}
    return inputs, root / "out", recover(RecoverParams(**LEARN), inputs, root / "out", Heard())


def test_recover_of_an_encoder_decoder_comes_nearer_on_text_it_never_saw(recovered, tmp_path):
    inputs, output, metrics = recovered
    before = kl(inputs["teacher"], inputs["model"], inputs["text"], tmp_path)
    after = kl(inputs["teacher"], output, inputs["text"], tmp_path)
    assert after < 0.8 * before
    assert metrics["kl_after"] < 0.8 * metrics["kl_before"]


def test_recover_of_an_encoder_decoder_goes_on_to_the_same_bytes(recovered, tmp_path):
    inputs, output, metrics = recovered

    class Stopper(Heard):
        def metric(self, name, value, step):
            super().metric(name, value, step)
            if name == "kl" and step == 11:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(RecoverParams(**LEARN), inputs, tmp_path / "out", Stopper())
    assert (tmp_path / "out" / PARTIAL / "answers-train.safetensors").is_file()
    heard = Heard()
    assert recover(RecoverParams(**LEARN), inputs, tmp_path / "out", heard) == metrics
    assert heard.steps() == list(range(9, 25))
    assert sealed(tmp_path / "out") == sealed(output)


def test_model_that_does_not_say_how_an_answer_begins_is_refused(folders, tmp_path):
    model = load_model(folders["t5"])
    save_model(model, tmp_path / "model", like=folders["t5"])
    for file in ("config.json", "generation_config.json"):
        path = tmp_path / "model" / file
        if path.is_file():
            read = json.loads(path.read_text())
            read.pop("decoder_start_token_id", None)
            path.write_text(json.dumps(read))
    inputs = {"model": tmp_path / "model", "text": folders["text"]}
    with pytest.raises(StageError, match="does not say how an answer begins"):
        run(QUANTIZE, {"scheme": "int4_weight_only", "block": 8, "window_tokens": 32}, inputs, tmp_path / "out")


SAYS_NO_TEXT = {
    "classes": ("BartForSequenceClassification", "BartConfig", FAMILIES["bart"][2] | {"num_labels": 3}),
    "span": ("BartForQuestionAnswering", "BartConfig", FAMILIES["bart"][2]),
    "t5_classes": ("T5ForSequenceClassification", "T5Config", FAMILIES["t5"][2] | {"num_labels": 3, "pad_token_id": 1}),
    "t5_span": ("T5ForQuestionAnswering", "T5Config", FAMILIES["t5"][2]),
}


@pytest.fixture(scope="module")
def writes_nothing(tmp_path_factory, tiny):
    """Encoder-decoders that classify, or find answers, by name."""
    root, tokenizer = tmp_path_factory.mktemp("writes-nothing"), load_tokenizer(tiny)

    def made(name):
        kind, config, settings = SAYS_NO_TEXT[name]
        if not (root / name).is_dir():
            torch.manual_seed(5)
            said = settings | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
            model = getattr(transformers, kind)(getattr(transformers, config)(**said))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(root / name)
            for file in tiny.glob("tokenizer*"):
                shutil.copyfile(file, root / name / file.name)
        return root / name

    return made


@pytest.mark.parametrize("name", SAYS_NO_TEXT)
def test_decoder_that_writes_nothing_reads_what_its_own_forward_hands_it(writes_nothing, folders, tmp_path, name):
    model, seen = load_model(writes_nothing(name)), []
    ids_NS = windows(folders["text"], "test", load_tokenizer(writes_nothing(name)), 16, most=5)
    found_NS = answered(model, ids_NS, tmp_path / "answers.safetensors")
    assert int((ids_NS[:, -1] == model.config.eos_token_id).sum()) == 5
    model.get_decoder().register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids_NS)
    assert torch.equal(found_NS, seen[0])
    assert torch.equal(found_NS[:, 1:], ids_NS[:, :-1])


CALIBRATED = {
    "int8": (QUANTIZE, {"scheme": "int8_w8a8", "embedding": "keep"}),
    "int4": (QUANTIZE, {"scheme": "int4_weight_only", "block": 8, "embedding": "keep"}),
    "factorize": (FACTORIZE, {"keep": 0.9}),
    "channels": (PRUNE, {"method": "channels", "keep": 0.9, "multiple": 4}),
}


@pytest.mark.parametrize("what", CALIBRATED)
@pytest.mark.parametrize("name", SAYS_NO_TEXT)
def test_encoder_decoders_that_write_nothing_are_calibrated_by_a_text(writes_nothing, folders, tmp_path, name, what):
    stage, params = CALIBRATED[what]
    inputs = {"model": writes_nothing(name), "text": folders["text"]}
    run(stage, params | {"windows": 8, "window_tokens": 32}, inputs, tmp_path / "out")
    dense, made = (load_model(one) for one in (inputs["model"], tmp_path / "out"))
    ids_NS = windows(folders["text"], "test", load_tokenizer(inputs["model"]), 32, most=8)
    ids_NS[:, -1] = dense.config.eos_token_id
    with torch.no_grad():
        wanted, found = (answer(task_of(one), one(input_ids=ids_NS)) for one in (dense, made))
    assert 0 < float((found - wanted).norm()) < 0.5 * float(wanted.norm())
