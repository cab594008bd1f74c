"""How the positions of a model turn in a graph."""

from __future__ import annotations

from transformers import PreTrainedModel

_BY_LENGTH = ("dynamic", "longrope")
"""Ways of transformers whose frequencies depend on the longest text that is read, beyond a length of their own."""
_BY_NONE = "default"


def hold_frequencies(model: PreTrainedModel) -> None:
    """Let positions turn by the frequencies of all texts that `tasks.longest` allows, whatever is read.

    The exporter takes no new frequencies that depend on numbers, and a row has those of no longer one beside it.

    Args:
        model: has read no longer text; it is of use for no longer one afterwards.
    """
    for module in model.modules():
        way = getattr(module, "rope_type", None)
        if isinstance(way, dict):  # each kind of layer turns in its own
            module.rope_type = {kind: _BY_NONE if one in _BY_LENGTH else one for kind, one in way.items()}
        elif way in _BY_LENGTH:
            module.rope_type = _BY_NONE
