"""What a Transformer is made of: stacks, blocks, maps and their roles, attention, classes.

May be imported from here: anything; `blocks` is imported as `anatomy`. Never comes in: names of single architectures
where the structure tells.
"""
