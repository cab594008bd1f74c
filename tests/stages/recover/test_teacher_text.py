import pytest
import torch

from stages.models.checkpoint.loading import load_model
from stages.recover.headless import load_apart
from stages.recover.teacher_answers import Lessons
from stages.recover.teacher_text import write
from stages.runtime.contract import StageError
from tests.stages.models.families import family


def written(teacher, count, tokens, seed, path, given=0, listened=None):
    """Windows that the teacher writes behind some that are given, and its answers on all of them."""
    ids_NT = torch.zeros(given + count, tokens, dtype=torch.int64)
    folder = path.with_suffix("")
    lessons = Lessons(teacher, ids_NT, folder, tokens_kept=6, temperature=1.0, listened=listened or {})
    write(teacher, ids_NT[given:], seed, path, lessons, given)
    return ids_NT[given:], lessons


def test_teacher_writes_by_its_own_distribution(tiny, tmp_path):
    """On its own text a model's surprise equals its entropy; on text of another distribution it does not."""
    ids_NT, _ = written(load_apart(tiny, 48), 40, 48, 0, tmp_path / "written.safetensors")
    with torch.no_grad():
        log_p = load_model(tiny)(input_ids=ids_NT).logits[:, :-1].log_softmax(-1)
    surprise = -log_p.gather(2, ids_NT[:, 1:, None]).mean()
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert float(surprise) == pytest.approx(float(entropy), rel=0.03)
    assert len(ids_NT[:, 0].unique()) > 30


def test_what_was_written_is_kept_and_another_seed_writes_other_text(tiny, tmp_path):
    teacher = load_apart(tiny, 8)
    first, _ = written(teacher, 3, 8, 0, tmp_path / "written.safetensors")
    assert torch.equal(written(teacher, 3, 8, 0, tmp_path / "again.safetensors")[0], first)
    assert torch.equal(written(teacher, 3, 8, 1, tmp_path / "written.safetensors")[0], first)
    assert not torch.equal(written(teacher, 3, 8, 1, tmp_path / "other.safetensors")[0], first)


def test_answers_on_what_was_written_are_those_of_the_whole_model(tiny, tmp_path, monkeypatch):
    teacher = load_apart(tiny, 24)
    block = {"model.layers.2": teacher.model.model.layers[2]}
    ids_NT, lessons = written(teacher, 70, 24, 0, tmp_path / "written.safetensors", given=2, listened=block)
    asked = Lessons(teacher, ids_NT, tmp_path / "asked", tokens_kept=6, temperature=1.0, listened=block).of(
        [0, 63, 64, 69]
    )  # both sides of what is written side by side
    monkeypatch.setattr(type(teacher), "hidden", None)  # nothing is asked again
    kept = lessons.of([2, 65, 66, 71])
    torch.testing.assert_close(kept.targets.log_p_Nk, asked.targets.log_p_Nk, atol=0.06, rtol=0.02)
    torch.testing.assert_close(kept.states[0].float(), asked.states[0].float(), atol=0.05, rtol=0.05)
    assert (kept.targets.tokens_Nk[:, 0] == asked.targets.tokens_Nk[:, 0]).float().mean() > 0.95


def test_an_encoder_is_not_asked_to_write(tmp_path):
    with pytest.raises(StageError, match=r"BertForMaskedLM cannot write text.*written_windows: 0"):
        written(load_apart(family("bert_masked", tmp_path), 8), 3, 8, 0, tmp_path / "written.safetensors")
