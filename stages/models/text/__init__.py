"""Text as a model reads it: windows of tokens, chat templates, and what a decoder answers to them.

May be imported from here: anything. Never comes in: where texts come from.
"""
