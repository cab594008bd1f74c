import pytest
import torch

from stages.models.apart import load_apart
from stages.models.loading import load_model
from stages.models.writing import written
from stages.runtime.contract import StageError
from tests.models.families import family


def test_teacher_writes_by_its_own_distribution(tiny, tmp_path):
    """On its own text a model's surprise equals its entropy; on text of another distribution it does not."""
    ids_NT = written(load_apart(tiny, 48), 40, 48, 0, tmp_path / "written.safetensors")
    with torch.no_grad():
        log_p = load_model(tiny)(input_ids=ids_NT).logits[:, :-1].log_softmax(-1)
    surprise = -log_p.gather(2, ids_NT[:, 1:, None]).mean()
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert float(surprise) == pytest.approx(float(entropy), rel=0.03)
    assert len(ids_NT[:, 0].unique()) > 30


def test_what_was_written_is_kept_and_another_seed_writes_other_text(tiny, tmp_path):
    teacher = load_apart(tiny, 8)
    first = written(teacher, 3, 8, 0, tmp_path / "written.safetensors")
    assert torch.equal(written(teacher, 3, 8, 0, tmp_path / "again.safetensors"), first)
    assert torch.equal(written(teacher, 3, 8, 1, tmp_path / "written.safetensors"), first)
    assert not torch.equal(written(teacher, 3, 8, 1, tmp_path / "other.safetensors"), first)


def test_an_encoder_is_not_asked_to_write(tmp_path):
    with pytest.raises(StageError, match=r"BertForMaskedLM cannot write text.*written_windows: 0"):
        written(load_apart(family("bert_masked", tmp_path), 8), 3, 8, 0, tmp_path / "written.safetensors")
