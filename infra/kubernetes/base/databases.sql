-- Run once, on an empty volume. POSTGRES_DB itself is made by the image.
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_users;
