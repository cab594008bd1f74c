"""A checkpoint that answers by torch, one operation after the other.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stages.adapters.backends import Forward
from stages.models.checkpoint.loading import load_model


def torch_forward(folder: Path) -> Forward:
    """(ids_NT, mask_NT) -> logits_NTV of a CHECKPOINT folder, in fp32.

    Raises:
        StageError: the checkpoint is damaged or not understood.
    """
    model = load_model(folder)

    def forward(ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        mask = torch.from_numpy(mask_NT)
        positions_NT = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits_NTV = model(
                input_ids=torch.from_numpy(ids_NT), attention_mask=mask, position_ids=positions_NT, use_cache=False
            ).logits
        found: NDArray[np.float32] = logits_NTV.numpy()
        return found

    return forward
