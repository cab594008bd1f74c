"""A tiny checkpoint with surgery: two blocks read gate on one basis, two others share a value map."""

import torch

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers import low_rank_linear


def grouped(tiny, folder, *, rank=64):
    """Blocks 1 and 2 hold gate and down as coefficients of a basis each; blocks 3 and 4 share one v weight."""
    model = load_model(tiny)
    names = {
        role: [f"{anatomy.blocks(model)[i].name}.{anatomy.path(role)}" for i in (1, 2)] for role in ("gate", "down")
    }
    dense = {name: model.get_submodule(name).weight.detach().clone() for both in names.values() for name in both}
    tied = [f"{anatomy.blocks(model)[i].name}.{anatomy.path('v')}.weight" for i in (3, 4)]
    low_rank_linear.install(
        model, {"shared": [{"modules": both, "rank": rank} for both in names.values()], "tied": [tied]}
    )
    with torch.no_grad():
        for both in names.values():
            _u, size_R, v_RI = torch.linalg.svd(torch.cat([dense[name] for name in both]), full_matrices=False)
            first = model.get_submodule(both[0])
            first.basis.weight.copy_((size_R[:rank, None] / size_R[0]) * v_RI[:rank])
            for name in both:
                back_RI = v_RI[:rank] / (size_R[:rank, None] / size_R[0])
                model.get_submodule(name).coefficient.weight.copy_(dense[name] @ back_RI.t())
    save_model(model, folder, like=tiny)
    return folder
