"""One face over every backend: the same text from torch, the graph and the engine."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from stages.compile.stage import CompileParams, compile_engine
from stages.runtime.contract import StageError
from stages.serving.engine import open_engine
from stages.serving.generation import Generation
from tests.conftest import sealer
from tests.engines import Hears, mixed, mixed_graph, token_windows  # noqa: F401

PROMPTS = ["The for statement is used to", "A class", "If the expression is found to be true, then the suite"]


@pytest.fixture(scope="module")
def engine(mixed_graph, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("engine")
    compile_engine(CompileParams(backend="onnxruntime", maximum_tokens=64), {"graph": mixed_graph}, folder, Hears())
    return folder


def transformers_greedy(folder, prompts, new):
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def test_checkpoint_continues_as_transformers_does(tiny):
    opened = open_engine(tiny)
    assert opened.target == "torch:cpu"
    assert opened.generate(PROMPTS, max_new_tokens=12) == transformers_greedy(tiny, PROMPTS, 12)


def test_engine_graph_and_checkpoint_say_the_same(mixed, mixed_graph, engine):  # noqa: F811
    opened = [open_engine(folder) for folder in (mixed, mixed_graph, engine)]
    assert [one.target for one in opened] == ["torch:cpu", "onnxruntime:cpu", "onnxruntime:cpu"]
    texts = [one.generate(PROMPTS, max_new_tokens=8) for one in opened]
    assert texts[0] == texts[1] == texts[2]
    by_beams = [one.generate(PROMPTS, max_new_tokens=8, beams=3) for one in opened]
    assert by_beams[0] == by_beams[1] == by_beams[2] != texts[0]
    ids = token_windows(2, 17)
    logits = [one.logits(ids) for one in opened]
    assert logits[0].dtype == np.float32 and logits[0].shape == (2, 17, 768)
    for other in logits[1:]:
        assert np.abs(other - logits[0]).mean() < 2e-3 * logits[0].std()


def test_a_prompt_among_others_is_answered_as_if_alone(engine):
    opened = open_engine(engine)
    assert opened.generate(PROMPTS, max_new_tokens=6) == [opened.generate([p], max_new_tokens=6)[0] for p in PROMPTS]


def test_generation_ends_where_the_model_ends_it(tiny, tmp_path):
    opened = open_engine(tiny)
    first = opened.tokenizer.encode(opened.generate(["A class"], max_new_tokens=1)[0]).ids[0]
    shutil.copytree(tiny, tmp_path / "ends")
    (tmp_path / "ends" / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 3]}))
    ends = open_engine(tmp_path / "ends")
    assert ends.ends == {first, 3}
    assert opened.tokenizer.encode(ends.generate(["A class"], max_new_tokens=9)[0]).ids == [first]


def test_generation_stops_at_the_longest_sequence(engine):
    opened = open_engine(engine)
    prompt = "a " * 30
    length = len(opened.tokenizer.encode(prompt).ids)
    new = opened.tokenizer.encode(opened.generate([prompt], max_new_tokens=64)[0]).ids
    assert 0 < len(new) <= 64 - length


@pytest.mark.parametrize("most", [0, 65, 100_000])
def test_number_of_new_tokens_that_no_sequence_has_is_refused_before_anything_runs(engine, most):
    opened = dataclasses.replace(open_engine(engine), forward=None)
    with pytest.raises(StageError, match=f"max_new_tokens is .*; measured {most}; limit "):
        opened.generate(["A class"], max_new_tokens=most)


@pytest.fixture(scope="module")
def both(tiny, engine):
    """One that keeps what it reads and one that does not."""
    opened = [open_engine(engine), dataclasses.replace(open_engine(engine), steps=None)]
    assert opened[0].steps is not None
    return opened


DRAWN = {"max_new_tokens": 9, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}


def test_drawn_text_is_the_same_for_a_seed_whatever_is_asked_beside(both):
    many = [*PROMPTS, PROMPTS[0], "def f(x):", "  ", "import", "while True", "b", "A class"]
    for opened in both:
        first = opened.generate(many, **DRAWN, seed=7)
        assert first == opened.generate(many, **DRAWN, seed=7)
        assert first == [opened.generate([one], **DRAWN, seed=7)[0] for one in many]
        assert first[0] == first[3] and first[1] == first[-1]
        assert first != opened.generate(many, **DRAWN, seed=8)
        assert first != opened.generate(many, max_new_tokens=9)
        assert opened.generate(many, **DRAWN) != opened.generate(many, **DRAWN)


def test_one_token_to_draw_from_is_the_likeliest(both):
    for opened in both:
        greedy = opened.generate(PROMPTS, max_new_tokens=8)
        for asked in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}):
            assert opened.generate(PROMPTS, max_new_tokens=8, seed=1, **{"temperature": 1.0} | asked) == greedy


def test_penalized_greedy_text_is_transformers_own(tiny):
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    wanted = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, repetition_penalty=1.3)
        wanted.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    opened = open_engine(tiny)
    assert opened.generate(PROMPTS, max_new_tokens=12, repetition_penalty=1.3) == wanted
    assert opened.generate(PROMPTS, max_new_tokens=12) != wanted


def test_answer_ends_before_a_stop_string_wherever_tokens_part_it(both):
    for opened in both:
        whole = opened.generate(["The for"], max_new_tokens=12)[0]
        for start in range(len(whole) - 3):
            stop = whole[start : start + 3]
            told = opened.generate(["The for"], max_new_tokens=12, stop=[stop, "never said"])[0]
            assert told == whole[: whole.index(stop)]
            (found,) = opened.answers(["The for"], Generation(max_new_tokens=12, stop=(stop,)))
            assert found.finish == "stop" and found.new_tokens <= 12
        beside = opened.generate([*PROMPTS, "The for"], max_new_tokens=12, stop=whole[2:5])
        assert beside[-1] == whole[: whole.index(whole[2:5])]


@pytest.mark.parametrize("asked", [{}, {"stop": ["e s", "ion"]}, {"temperature": 1.5, "seed": 3}])
def test_pieces_of_a_stream_are_the_whole_text(both, asked):
    for opened in both:
        for prompt in PROMPTS:
            stream, pieces = opened.stream(prompt, max_new_tokens=14, **asked), []
            while True:
                try:
                    pieces.append(next(stream))
                except StopIteration as end:
                    answer = end.value
                    break
            assert "".join(pieces) == answer.text == opened.generate([prompt], max_new_tokens=14, **asked)[0]
            assert all(pieces) and (asked.get("stop") or len(pieces) > 1)
            assert answer.prompt_tokens == len(opened.tokenizer.encode(prompt).ids)


def test_stream_refuses_before_its_first_piece(engine):
    with pytest.raises(StageError, match="a prompt is empty"):
        open_engine(engine).stream("")


def test_model_without_a_template_takes_no_conversation(engine):
    with pytest.raises(StageError, match="the model has no chat template"):
        open_engine(engine).generate([[{"role": "user", "content": "Hello"}]])


def test_conversation_is_read_as_transformers_reads_it(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "talks")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    end = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    (folder / "chat_template.jinja").write_text(
        "{{ '"
        + end
        + "' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '"
        + end
        + "' }}{% endfor %}bot:"
    )
    opened, messages = open_engine(folder), [{"role": "user", "content": "for what?"}]
    told = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, return_dict=False)
    (answer,) = opened.answers([messages], Generation(max_new_tokens=5))
    seen = []
    dataclasses.replace(
        opened, steps=None, forward=lambda ids, mask: (seen.append(ids), opened.forward(ids, mask))[1]
    ).generate([messages], max_new_tokens=5)
    assert seen[0][0].tolist() == told and answer.prompt_tokens == len(told)
    assert opened.generate([messages, "A class"], max_new_tokens=5)[0] == answer.text


def test_what_cannot_be_answered_is_refused(engine, tmp_path):
    opened = open_engine(engine)
    with pytest.raises(StageError, match="a prompt is empty"):
        opened.generate(["a", ""])
    with pytest.raises(StageError, match=r"a prompt is no text; measured '\\udc80' at character 1; limit what UTF-8"):
        opened.generate(["a\udc80"])
    with pytest.raises(StageError, match=r"measured \d+ tokens; limit 64 tokens"):
        opened.generate(["a class " * 99])
    with pytest.raises(StageError, match="limit 64 tokens"):
        opened.logits(token_windows(1, 65))
    with pytest.raises(StageError, match=r"config.json is missing"):
        open_engine(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StageError, match="not JSON"):
        open_engine(tmp_path)


def test_engine_without_tokenizer_is_refused(engine, tmp_path):
    shutil.copytree(engine, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(StageError, match=r"no tokenizer.json"):
        open_engine(tmp_path / "bare")


def test_engine_of_a_backend_that_is_not_here_is_refused(engine, tmp_path):
    shutil.copytree(engine, tmp_path / "other")
    described = json.loads((engine / "engine.json").read_text()) | {"backend": "abacus"}
    (tmp_path / "other" / "engine.json").write_text(json.dumps(described))
    with pytest.raises(StageError, match="there is no backend 'abacus'"):
        open_engine(tmp_path / "other")


def test_engine_for_the_cpu_answers_without_torch(engine):
    code = (
        "import sys; from pathlib import Path; from stages.serving.engine import open_engine;"
        f"open_engine(Path({str(engine)!r})).generate(['A class'], max_new_tokens=2);"
        "sys.exit(any(n in sys.modules for n in ('torch', 'transformers', 'onnx', 'tensorrt_rtx', 'safetensors')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sealed_graph_and_its_engine_answer_from_the_store(shared_store, mixed_graph):  # noqa: F811
    made = sealer(shared_store)("compile", {"backend": "onnxruntime"}, graph=mixed_graph.name)
    folder = shared_store.checkout(made.identity)
    assert open_engine(folder).generate(["A class"], max_new_tokens=3) == open_engine(mixed_graph).generate(
        ["A class"], max_new_tokens=3
    )


def test_greedy_takes_the_likeliest_of_a_brute_force(tiny):
    """Every continuation of two tokens scored by torch: greedy's first token has the largest logit."""
    opened = open_engine(tiny)
    ids = opened.tokenizer.encode("A class").ids
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(tiny)(torch.tensor([ids])).logits[0, -1]
    chosen = opened.tokenizer.decode([int(logits.argmax())])
    assert opened.generate(["A class"], max_new_tokens=1) == [chosen]
