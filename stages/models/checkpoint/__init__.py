"""The one loader and the one saver: files, tensors, uneven sizes, the layout of compressed-tensors, editing.

May be imported from here: anything. Never comes in: calibration and training.
"""
