"""Group calls: n executors that start together or not at all, and know each other."""

from typing import Any


class Context:
    """What a member of a group knows: its rank, the group's size, and how to reach the others."""


class Group:
    def __init__(self, *parts: Any) -> None:
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        raise NotImplementedError
