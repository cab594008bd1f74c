import pytest
import torch

from stages.models.checkpoint.loading import load_model, save_model
from stages.prune.depth import drop_blocks
from stages.recover.headless import load_apart
from stages.recover.matched_blocks import listened, matched
from stages.recover.teacher_answers import Lessons
from stages.runtime.contract import StageError
from tests.stages.models.families import VOCABULARY, family

TOKENS = 12
IDS_NT = torch.randint(3, VOCABULARY, (5, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher(tmp_path):
    return load_apart(family("llama", tmp_path), TOKENS)


def lessons(teacher, folder, **settings):
    return Lessons(teacher, IDS_NT, folder, **{"tokens_kept": 6, "temperature": 1.0, "listened": {}} | settings)


def expected(tmp_path, chosen, temperature=1.0):
    with torch.no_grad():
        logits = load_model(tmp_path / "llama", dtype=torch.bfloat16)(input_ids=IDS_NT[chosen]).logits
    return (logits.float() / temperature).log_softmax(-1).flatten(0, 1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_answers_are_the_likeliest_tokens_of_the_whole_model(teacher, tmp_path, temperature):
    found = lessons(teacher, tmp_path / "kept", temperature=temperature).of([3, 1]).targets
    log_p_NV = expected(tmp_path, [3, 1], temperature)
    assert found.tokens_Nk.shape == (2 * TOKENS, 6)
    assert (found.log_p_Nk.diff(dim=1) <= 0).all()
    torch.testing.assert_close(log_p_NV.gather(1, found.tokens_Nk.long()), found.log_p_Nk, atol=0.05, rtol=0.02)
    torch.testing.assert_close(log_p_NV.topk(6).values, found.log_p_Nk, atol=0.05, rtol=0.02)


def test_kept_answers_are_read_and_not_asked_again(teacher, tmp_path):
    before = lessons(teacher, tmp_path / "kept").of([0, 4])
    with torch.no_grad():  # another teacher would answer otherwise
        for parameter in teacher.model.parameters():
            parameter.mul_(0.5)
    after = lessons(teacher, tmp_path / "kept")
    assert torch.equal(after.of([4, 0]).targets.log_p_Nk[:TOKENS], before.targets.log_p_Nk[TOKENS:])
    fresh = lessons(teacher, tmp_path / "other").of([0, 4])
    assert not torch.equal(fresh.targets.log_p_Nk, before.targets.log_p_Nk)
    torch.testing.assert_close(
        after.of([2]).targets.log_p_Nk, lessons(teacher, tmp_path / "o").of([2]).targets.log_p_Nk
    )


def test_disk_that_fills_up_is_an_error_and_the_answer_is_asked_again(teacher, small_disk, tmp_path):
    """A page of a mapped file that finds no room would end the process without a word."""
    kept, ballast = lessons(teacher, small_disk / "kept"), small_disk / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    with pytest.raises(OSError, match="No space"):
        kept.of([2])
    ballast.unlink()
    again = kept.of([2])
    assert torch.equal(again.targets.log_p_Nk, lessons(teacher, tmp_path / "other").of([2]).targets.log_p_Nk)


@pytest.mark.parametrize("file", ["tokens", "log_p", "state-0", "checksums"])
def test_answer_that_was_half_written_is_asked_again(teacher, tmp_path, file):
    block = {"model.layers.1": teacher.model.model.layers[1]}
    before = lessons(teacher, tmp_path / "kept", listened=block).of([2])
    whole = (tmp_path / "kept" / file).read_bytes()
    (tmp_path / "kept" / file).write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    after = lessons(teacher, tmp_path / "kept", listened=block).of([2])
    assert torch.equal(after.targets.tokens_Nk, before.targets.tokens_Nk)
    assert torch.equal(after.targets.log_p_Nk, before.targets.log_p_Nk)
    assert torch.equal(after.states[0], before.states[0])


def test_states_are_what_the_block_reads(teacher, tmp_path):
    block = {"model.layers.2": teacher.model.model.layers[2]}
    found = lessons(teacher, tmp_path / "kept", listened=block).of([1, 0]).states[0]
    with torch.no_grad():
        outputs = load_model(tmp_path / "llama", dtype=torch.bfloat16)(
            input_ids=IDS_NT[[1, 0]], output_hidden_states=True
        )
    torch.testing.assert_close(found, outputs.hidden_states[2], atol=0.05, rtol=0.05)


def test_teacher_that_answers_nan_is_an_error(teacher, tmp_path):
    with torch.no_grad():
        teacher.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(StageError, match="window 1 of the train split holds a NaN"):
        lessons(teacher, tmp_path / "kept").of([1])


@pytest.mark.parametrize(("dropped", "heard"), [([1], [(1, 2)]), ([0, 4], [(3, 5)]), ([], [(2, 2), (3, 3), (4, 4)])])
def test_blocks_are_matched_and_listened_to_where_others_are_missing(tiny, tmp_path, dropped, heard):
    cut = load_model(tiny)
    if dropped:
        drop_blocks(cut, dropped)
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    save_model(cut, tmp_path / "cut", like=tiny)
    student, teacher = load_model(tmp_path / "cut"), load_model(tiny)
    assert matched(student, teacher) == [n for n in range(6) if n not in dropped]
    assert [(mine.index, theirs.index) for mine, theirs in listened(student, teacher)] == heard
