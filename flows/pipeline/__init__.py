"""A recipe's run from its first step to the registry: the Prefect flow, the verdict, the end of a run, Prefect's pages.

May be imported from here: `optimize`, for `flows.commands` and `flows.triggers`. Never comes in: how one step runs
(`flows.running`), what a gate is (`flows.judging`), how a version is promoted (`flows.registry`).
"""
