"""What admission says of a student and its teacher is what the work says of them."""

import pytest

from stages.models.checkpoint import layout
from stages.models.checkpoint.loading import outlined
from stages.models.checkpoint.subject import Subject, subject
from stages.recover.checks import check_known
from stages.recover.headless import load_apart
from stages.recover.params import RecoverParams
from stages.recover.student import Goal, learner
from stages.recover.teacher_text import write
from stages.runtime.contract import StageError
from tests.stages.models.families import family


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def known(name, root) -> Subject:
    folder = family(name, root)
    files = {layout.WEIGHTS: folder / layout.WEIGHTS}
    return subject(folder, outlined(folder, files.values())[0], layout.check_headers(folder, files), [])


def refused(model: Subject, teacher: Subject, **params) -> StageError:
    with pytest.raises(StageError) as ahead:
        check_known(model, teacher, RecoverParams(window_tokens=16, **params))
    return ahead.value


class Nothing:
    ids_NT = None


@pytest.mark.parametrize("name", ["bert_masked", "marian"])
def test_a_goal_that_teaches_nothing_is_refused_as_by_the_work(name, root):
    it = known(name, root)
    student = load_apart(family(name, root), 16)
    with pytest.raises(StageError) as work:
        learner(student, Nothing, None, goal=Goal(0.5, 1.0, 0.0), at_once=1, listened={}, written=0)
    assert str(refused(it, it, kl_weight=0.5)) == str(work.value)
    check_known(it, it, RecoverParams(window_tokens=16, kl_weight=1))
    with pytest.raises(StageError) as work:
        write(student, None, 0, root / "written", None, 0)
    assert str(refused(it, it, written_windows=2)) == str(work.value)


def test_a_decoder_may_write_and_predict(root):
    it = known("llama", root)
    check_known(it, it, RecoverParams(window_tokens=16, kl_weight=0.5, written_windows=4))


def test_a_teacher_that_reads_less_than_the_model_is_refused_as_by_the_work(root):
    endless, short = known("bloom", root), known("llama", root)
    model = Subject(short.folder, endless.model, "generate")
    check_known(short, short, RecoverParams(window_tokens=65))  # windows are cut to what the model reads
    with pytest.raises(StageError) as work:
        load_apart(family("llama", root), 65)
    with pytest.raises(StageError) as ahead:
        check_known(model, short, RecoverParams(window_tokens=65))
    assert str(ahead.value) == str(work.value)
    works = int(ahead.value.remedy.split()[-1].rstrip("."))
    assert load_apart(family("llama", root), works)
