"""Recipes: the model, pure data; reading a file with its lines; checking the sense; expanding it into planned steps.

May be imported from here: anything. Never comes in: stores, runs, and whatever computes; a recipe is checked without
torch.
"""
