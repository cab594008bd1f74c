"""A store that was moved takes its MLflow along: the embedded database has the places of its files as whole URIs."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def follow(database: Path, old: str, files: Path) -> None:
    """Have a database find in `files` what it knows below `old`, where that is the same folder at another place.

    Args:
        database: MLflow's SQLite file.
        old: URI of the folder of artifacts that the experiment names.
        files: the folder of artifacts beside the database.
    """
    new = files.as_uri()
    if old == new or old.rpartition("/")[2] != files.name or not files.is_dir():
        return
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column in _PLACES:
            connection.execute(
                f"update {table} set {column} = ? || substr({column}, ?) "  # noqa: S608 - names of the table above
                f"where {column} = ? or substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )
