"""Open one of a site's small SQLite databases, readable by its user only."""

import sqlite3
from pathlib import Path
from typing import Literal

from isthmus.core.errors import SettingsError


def open_database(
    path: Path,
    schema: str,
    synchronous: Literal["NORMAL", "FULL"],
    held: str,
    across_threads: bool = False,
) -> sqlite3.Connection:
    """In autocommit mode, with a write-ahead log.

    synchronous  FULL: what is committed survives the machine's death; NORMAL: only the process's
    held         what is lost without the file, for people: "all API keys"
    raises       SettingsError for a file that is no database, or cannot be written
    """
    path.touch(mode=0o600)
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=not across_threads)
    try:
        database.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous={synchronous}; {schema}")
    except sqlite3.DatabaseError as error:
        database.close()
        raise SettingsError(
            f"cannot use {path}: {error}; free disk space, or put back a copy (moved away, {held} are gone)"
        ) from error
    return database
