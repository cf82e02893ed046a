"""The function table: kinds, loading, actors."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from isthmus.core.errors import FunctionLoadError
from isthmus.fabric.codec import FunctionHeader, encode_function, function_kind
from isthmus.node.functions import COUNTED, Function, Loop
from isthmus.sdk.carriers import Chunk


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def _function(target: Any, loop: Loop) -> Function:
    header = FunctionHeader(name="f", kind=function_kind(target))
    return Function(header, encode_function(target), 0, loop)


def test_a_plain_function_has_a_target_once_loaded(loop: Loop) -> None:
    function = _function(lambda value: value + 1, loop)
    assert function.target is None
    assert function.invoke(1) == 2
    assert function.target is not None
    assert function.target(2) == 3


def test_a_coroutine_function_is_run_to_its_end(loop: Loop) -> None:
    async def late(value: int) -> int:
        await asyncio.sleep(0)
        return value

    function = _function(late, loop)
    assert function.invoke(3) == 3
    assert function.target is None


def test_code_that_cannot_be_loaded_fails_each_time_alike(loop: Loop) -> None:
    function = Function(FunctionHeader(name="f"), b"cno_such_module\nf\n.", 0, loop)
    for _ in range(2):
        with pytest.raises(FunctionLoadError, match="no_such_module"):
            function.invoke()


class Recorder:
    events: list[str] = []  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.name = name
        self.events.append(f"made {name}")

    def enter(self) -> None:
        self.events.append("entered")

    async def leave(self) -> None:
        self.events.append("left")

    def greet(self, *, self_: str = "") -> str:
        return self.name + self_


Recorder.enter.__isthmus_enter__ = True  # type: ignore[attr-defined]
Recorder.leave.__isthmus_exit__ = True  # type: ignore[attr-defined]


def test_an_actor_is_made_entered_used_and_left_once(loop: Loop) -> None:
    actor = Function(FunctionHeader(name="R", kind="actor"), b"", 0, loop)
    actor._loaded = Recorder
    Recorder.events = []
    with pytest.raises(RuntimeError, match="before the actor was made"):
        actor.invoke("greet")
    assert actor.invoke("__init__", "a") is None
    assert actor.invoke("greet", self_="!") == "a!"
    actor.leave()
    actor.leave()
    assert Recorder.events == ["made a", "entered", "left"]


def test_an_exit_method_that_raises_stops_nothing(loop: Loop, capsys: pytest.CaptureFixture[str]) -> None:
    class Bad:
        def leave(self) -> None:
            raise ValueError("on the way out")

    Bad.leave.__isthmus_exit__ = True  # type: ignore[attr-defined]
    actor = Function(FunctionHeader(name="B", kind="actor"), encode_function(Bad), 0, loop)
    actor.invoke("__init__")
    actor.leave()
    assert "on the way out" in capsys.readouterr().err


def test_a_call_that_runs_a_function_many_times_counts_each(loop: Loop) -> None:
    chunk = _function(Chunk(lambda value: 1 // value), loop)
    chunk.invoke((1,), (0,), (2,))
    assert chunk.target is None, "it would be counted as one call"
    assert chunk.counted(raised=False) == (3, 1)
    assert chunk.counted(raised=True) == (1, 1), "one that failed before it began"

    def leave(value: int) -> None:
        if value == 2:
            raise KeyboardInterrupt

    interrupted = _function(Chunk(leave), loop)
    with pytest.raises(KeyboardInterrupt):
        interrupted.invoke((1,), (2,), (3,))
    assert interrupted.counted(raised=True) == (2, 1)


def test_any_other_call_counts_once(loop: Loop) -> None:
    function = _function(lambda value: value, loop)
    assert function.counted(raised=False) == (1, 0)
    assert function.counted(raised=True) == (1, 1)


class Answering:
    """Has every attribute that one asks it for, like a proxy or a mock."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("__") and name != COUNTED:
            raise AttributeError(name)
        return "yes"

    def __call__(self, value: int) -> int:
        return value


class Strict(type):
    """Of classes that let nobody look for what they have not."""

    def __getattr__(cls, name: str) -> Any:
        raise RuntimeError(name)


class Guarded(metaclass=Strict):
    def greet(self) -> str:
        return "hello"


def test_a_callable_with_every_attribute_counts_once(loop: Loop) -> None:
    function = _function(Answering(), loop)
    assert function.invoke(3) == 3
    assert function.counted(raised=False) == (1, 0)


def test_an_actors_class_is_not_asked_how_to_count(loop: Loop) -> None:
    actor = Function(FunctionHeader(name="G", kind="actor"), encode_function(Guarded), 0, loop)
    actor.invoke("__init__")
    assert actor.invoke("greet") == "hello"
    assert actor.counted(raised=False) == (1, 0)
    actor.leave()
