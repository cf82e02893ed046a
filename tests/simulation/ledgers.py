"""The real ledger with a failing disk, and with a site that dies right after a commit."""

import random
import sqlite3
from collections.abc import Callable

from isthmus.leasing import Ledger

DISK_FULL = 0.002
DIE_AFTER_COMMIT = 0.002


class FaultyLedger(Ledger):
    """`die` is called in the instant after a commit; what the site does from then on reaches nobody."""

    def __init__(self, path: str, chance: random.Random, die: Callable[[], None]) -> None:
        super().__init__(path)
        self._chance = chance
        self._die = die
        self.is_dead = False
        self.is_calm = False

    def _commit(self) -> None:
        if self.is_dead:
            raise sqlite3.OperationalError("this site is dead")
        if not self.is_calm and self._chance.random() < DISK_FULL:
            raise sqlite3.OperationalError("database or disk is full")
        super()._commit()
        if not self.is_calm and self._chance.random() < DIE_AFTER_COMMIT:
            self.is_dead = True
            self._die()
