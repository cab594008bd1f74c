import torch
from torch import nn

from stages.models.blockwise.replay import Replay


class Two(nn.Module):
    """Two maps, one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x, change=None):
        y = self.first(x)
        if change:
            change(y)
        return self.second(y)


@torch.no_grad()
def test_calls_before_the_mark_are_given_again_and_those_after_it_are_not():
    model, x, run = Two(), torch.randn(3, 4), Replay()
    hook = model.second.register_forward_pre_hook(lambda *_: run.mark())
    with run:
        before = model(x)
    hook.remove()
    model.second.weight = nn.Parameter(torch.randn(4, 4))
    kept = [one.made for one in run._given]
    assert len(kept) == 1
    with run:
        after = model(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(x))
    torch.testing.assert_close(kept[0], model.first(x))


@torch.no_grad()
def test_other_weights_before_the_mark_are_noticed():
    model, x, run = Two(), torch.randn(3, 4), Replay()
    hook = model.second.register_forward_pre_hook(lambda *_: run.mark())
    with run:
        model(x)
    model.first.weight = nn.Parameter(torch.randn(4, 4))
    with run:
        narrowed = model(x)
    hook.remove()
    torch.testing.assert_close(narrowed, model(x))


@torch.no_grad()
def test_a_result_that_the_block_changes_in_place_is_computed_again():
    model, x, run = Two(), torch.randn(3, 4), Replay()
    hook = model.second.register_forward_pre_hook(lambda *_: run.mark())
    expected = model.second(model.first(x) + 1)
    for _ in range(3):
        with run:
            torch.testing.assert_close(model(x, change=lambda y: y.add_(1)), expected)
    hook.remove()


@torch.no_grad()
def test_nothing_is_kept_of_a_run_without_a_mark():
    model, run = Two(), Replay()
    with run:
        model(torch.randn(3, 4))
    assert run._given == []


def test_inference_tensors_are_computed_again():
    model, x, run = Two(), torch.randn(3, 4), Replay()
    with torch.inference_mode():
        for _ in range(2):
            with run:
                run_out = model(x)
                run.mark()
        torch.testing.assert_close(run_out, model(x))


@torch.no_grad()
def test_other_inputs_before_the_mark_are_noticed():
    class Own(nn.Linear):
        """A map that multiplies by itself, as Falcon's."""

        def forward(self, x):
            return x @ self.weight.T

    model, x, run = Two(), torch.randn(3, 4), Replay()
    model.first = nn.Sequential(Own(4, 4, bias=False), nn.Linear(4, 4))
    hook = model.second.register_forward_pre_hook(lambda *_: run.mark())
    with run:
        model(x)
    model.first[0].weight = nn.Parameter(torch.randn(4, 4))
    with run:
        changed = model(x)
    hook.remove()
    torch.testing.assert_close(changed, model(x))
