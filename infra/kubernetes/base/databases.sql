-- Run once, on an empty volume. POSTGRES_DB itself is made by the image.
CREATE DATABASE mlflow TEMPLATE template0 ENCODING 'UTF8';
CREATE DATABASE mlflow_users TEMPLATE template0 ENCODING 'UTF8';
