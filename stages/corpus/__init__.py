"""corpus: text becomes splits that share no paragraph.

`stage` is the verb, `params` what a recipe may say, `reading` the sources, `dealing` passages and splits,
`self_written` the text that a model writes itself, which only a corpus that has one loads.

May be imported from here: nothing, but for `STAGES`. Never comes in: torch, but in `self_written`; windows, which are
`stages.models.text`'s.
"""
