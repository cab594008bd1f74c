"""What runs, when and where: recipes, Prefect, MLflow, the command line."""
