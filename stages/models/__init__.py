"""Transformers as modules: what they are made of, how they are loaded, and one pass over their blocks. Seven rooms.

May be imported from here: each room by the verbs and by the rooms above it: low_rank, blockwise, checkpoint, layers,
anatomy and text, memory. Never comes in: what one verb alone uses, which lies in that verb's folder.
"""
