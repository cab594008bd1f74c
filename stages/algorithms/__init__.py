"""Pure functions over tensors, one technique a file, from the papers.

May be imported from here: anything. Never comes in: modules, checkpoints, files, progress; anything of ours but each
other.
"""
