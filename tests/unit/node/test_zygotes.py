"""Zygotes that nobody uses do not pile up."""

import asyncio
import time

from isthmus.core.model import Environment
from isthmus.node import zygotes
from isthmus.node.isolation import choose
from isthmus.node.zygotes import Zygotes, default_python


def test_the_longest_unused_are_stopped_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(zygotes, "ZYGOTES_MAX", 2)
    environments = [Environment(preload=(module,)) for module in ("colorsys", "wave", "tabnanny")]

    async def scenario():
        isolation, _ = choose("none", "test")
        kept = Zygotes("sockets", tmp_path / "log", isolation)
        try:
            for environment in environments:
                (await kept.take(environment, default_python(), spares=0)).discard()
            ids = [environment.id for environment in environments]
            assert kept.idle(set(), time.monotonic()) == ids[:1]
            assert kept.idle({ids[0]}, time.monotonic()) == ids[1:2]
            await kept.stop(ids[0])
            assert kept.idle(set(), time.monotonic()) == []
            assert kept.idle(set(), time.monotonic() + 2 * zygotes.IDLE_S) == ids[1:]
        finally:
            await kept.close()

    asyncio.run(scenario())
