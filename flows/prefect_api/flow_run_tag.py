"""The mark by which our flow runs are known on a server that other teams use, too."""

OURS = "enginery"
"""A tag of every deployment in infra/prefect.yaml, and of the flow runs that no deployment starts."""
