"""Positions that turn otherwise in long texts: what is read ends before, and a row is answered as it is alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from stages.compile.stage import CompileParams, compile_engine
from stages.export.stage import EXPORT, ExportParams, export
from stages.fetch import FETCH, FetchParams
from stages.runtime.contract import StageError
from stages.serving.engine import open_engine
from tests.engines import Hears

ALIKE, MOST = 24, 48
SHAPE = {
    "vocab_size": 768, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": MOST, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": ALIKE,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
ASKED = ExportParams(parity_windows=1, parity_tokens=16)


def saved(model, tiny, folder):
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(4 if one.ndim > 1 else 1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def turned_by_length(tiny, folder, **changes):
    torch.manual_seed(0)
    rope = LONG | changes
    config = Phi3Config(**SHAPE, rope_parameters=rope, original_max_position_embeddings=ALIKE)
    return saved(Phi3ForCausalLM(config), tiny, folder)


def turned_by_growth(tiny, folder):
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=DYNAMIC)), tiny, folder)


def engines(checkpoint, root):
    """The checkpoint and its engine, opened, and what export said."""
    heard = Hears()
    for name in ("graph", "engine"):
        (root / name).mkdir()
    export(ASKED, {"model": checkpoint}, root / "graph", heard)
    compile_engine(CompileParams(backend="onnxruntime"), {"graph": root / "graph"}, root / "engine", heard)
    return [open_engine(one) for one in (checkpoint, root / "engine")], heard.notes


def drawn(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(1, 700, length).tolist() for length in lengths]


def test_model_that_turns_long_texts_otherwise_reads_no_longer_ones(tiny, tmp_path):
    checkpoint = turned_by_length(tiny, tmp_path / "phi")
    both, notes = engines(checkpoint, tmp_path)
    assert any(f"engines read {ALIKE} tokens" in one for one in notes)
    short, long = drawn(10, ALIKE - 1)
    with torch.no_grad():
        alone = Phi3ForCausalLM.from_pretrained(checkpoint)(torch.tensor([short])).logits[0].numpy()
    for one in both:
        assert one.maximum_tokens == ALIKE
        np.testing.assert_allclose(one.logits(np.array([short]))[0], alone, atol=1e-4 * alone.std())
        assert one.generate([short], max_new_tokens=14) == one.generate([short, long], max_new_tokens=14)[:1]
        with pytest.raises(StageError, match=f"longer than the model reads; measured {ALIKE + 1} tokens"):
            one.generate(drawn(ALIKE + 1))


def test_model_that_turns_all_texts_alike_reads_as_many_as_it_has_positions(tiny, tmp_path):
    checkpoint = turned_by_length(tiny, tmp_path / "phi", long_factor=[1.0] * 4)
    assert open_engine(checkpoint).maximum_tokens == MOST


def test_frequencies_that_grow_beyond_the_last_position_are_those_before_it(tiny, tmp_path):
    checkpoint = turned_by_growth(tiny, tmp_path / "llama")
    both, _ = engines(checkpoint, tmp_path)
    ids = np.array(drawn(MOST))
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(checkpoint)(torch.from_numpy(ids)).logits.numpy()
    for one in both:
        assert one.maximum_tokens == MOST
        np.testing.assert_allclose(one.logits(ids), wanted, atol=1e-4 * wanted.std())
    assert both[0].generate(drawn(20), max_new_tokens=28) == both[1].generate(drawn(20), max_new_tokens=28)


def test_how_much_an_engine_will_read_is_known_before_any_work(tiny, tmp_path):
    checkpoint = turned_by_length(tiny, tmp_path / "phi")
    known = {"model": FETCH.admit(FetchParams(source=checkpoint.as_uri()), {})}
    assert (known["model"].reads, EXPORT.admit(ASKED, known).built) == (ALIKE, ALIKE)
