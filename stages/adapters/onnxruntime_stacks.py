"""An encoder and a decoder by ONNX Runtime: the text is read once, the answer by a cache of its own.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import ENCODER
from stages.adapters.onnxruntime import CachedSession, Kept, Session, open_session
from stages.runtime.contract import StageError


@dataclass(frozen=True)
class StackSessions:
    """See `stages.adapters.backends.Stacks`."""

    encoder: Session
    decoder: CachedSession

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64], places: int) -> Kept:
        """Read the texts."""
        kept, found = self.decoder.begin(len(ids_NT), places), self.encoder.outputs(ids_NT, mask_NT)
        taken = {one.name for one in self.decoder.session.get_inputs()}
        # Who looks into a graph has it give more than the decoder takes.
        kept.beside = {"attention_mask": mask_NT, **{name: one for name, one in found.items() if name in taken}}
        return kept

    def outputs(self, ids_NT: NDArray[np.int64], said_NT: NDArray[np.int64]) -> list[dict[str, NDArray[np.float32]]]:
        """Every output of the decoder's graph but the cache, and of the encoder's, by their names."""
        mask_NT = np.ones_like(ids_NT)
        kept = self.begin(ids_NT, mask_NT, said_NT.shape[1])
        return [self.decoder.outputs(said_NT, kept), self.encoder.outputs(ids_NT, mask_NT)]


def open_stacks(path: Path, *, literal: bool = False) -> StackSessions:
    """Load a decoder's graph, and the encoder's that stands beside it; see `onnxruntime.open_session`."""
    encoder, decoder = open_session(path.with_name(ENCODER), literal=literal), open_session(path, literal=literal)
    if not (isinstance(encoder, Session) and isinstance(decoder, CachedSession)):
        raise StageError(
            "the two graphs are no encoder and no decoder",
            measured=f"{type(encoder).__name__} and {type(decoder).__name__}",
            limit="Session and CachedSession",
            remedy="Export the model again.",
        )
    return StackSessions(encoder, decoder)
