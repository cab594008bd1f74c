"""Inputs on which tools of this field failed their users, made anew in miniature, and what is right for each.

`table` names them; `checkpoints`, `shapes`, `texts` and `runs` make each input, run the `enginery` command on it as a
user would, and hold what comes out against what is right. `inputs` makes checkpoints and texts, `place` runs commands
and reads what they say, `day` draws the third that a day has.
"""
