"""Gates: pure functions from reports to a verdict.

May be imported from here: `judge` and its verdict. Never comes in: stores, MLflow, Prefect, the recipe's file.
"""
