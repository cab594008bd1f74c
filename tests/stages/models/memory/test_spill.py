import torch

from stages.models.memory.spill import Shelf


def test_what_is_put_on_a_shelf_comes_back_by_key_and_name_and_leaves_no_file(tmp_path):
    made = {
        key: {name: torch.randn(key + 2, 3, generator=torch.Generator().manual_seed(key)) for name in "ab"}
        for key in range(4)
    }
    shelf = Shelf(tmp_path / "new")
    for key, tensors in made.items():
        shelf.put(key, {name: one.T if name == "b" else one for name, one in tensors.items()})
        assert torch.equal(shelf.get(0, "a"), made[0]["a"])  # reading between writings
    shelf.put(9, {"half": torch.tensor([1.5, -2.0]).bfloat16(), "whole": torch.tensor(7), "none": torch.zeros(0, 3)})
    for key in (3, 0, 2, 1):
        taken = shelf.take(key)
        assert list(taken) == ["a", "b"]
        assert torch.equal(taken["a"], made[key]["a"])
        assert torch.equal(taken["b"], made[key]["b"].T)
    assert shelf.get(9, "half").dtype == torch.bfloat16
    assert shelf.get(9, "half").tolist() == [1.5, -2.0]
    assert shelf.get(9, "whole").item() == 7
    assert shelf.get(9, "none").shape == (0, 3)
    assert list((tmp_path / "new").iterdir()) == []
