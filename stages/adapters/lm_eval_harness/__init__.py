"""lm-evaluation-harness: its tasks from local folders, and a model as it asks for one.

May be imported from here: `folder` by what seals a task, `tasks` by what puts it to a model, and only when it does.
Never comes in: how an artifact is executed, and gates.
"""
