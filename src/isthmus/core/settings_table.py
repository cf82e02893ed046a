"""The settings as a table: each with its value, where that came from, and what more or less of it costs.

The words are the docstrings under the fields in `settings.py`: written once, shown by `isthmus config`.
"""

import ast
import inspect
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from isthmus.core import settings as definitions
from isthmus.core.settings import Section, Settings, config_path, load
from isthmus.core.settings_sources import setting_of

Origin = Literal["default", "file", "environment"]


class Setting(NamedTuple):
    """`path` is as in TOML: `leasing.lease_s`; `value` is plain data."""

    path: str
    value: Any
    default: Any
    origin: Origin
    description: str


def table(environ: Mapping[str, str] = os.environ) -> list[Setting]:
    """All settings of this process, in the order of `settings.py`. Raises SettingsError as `load` does."""
    effective, words = load(environ=environ), _descriptions()
    in_file = _file_paths(config_path(environ))
    return [
        Setting(path, value, default, _origin(path, in_file, environ), words[kind, path.rpartition(".")[2]])
        for kind, path, value, default in _walk(effective, Settings(), "")
    ]


def render_toml() -> str:
    """A settings file with every default, all commented out, and what each means."""
    lines = [
        "# Settings of isthmus. Uncomment what you change; `isthmus config` shows what holds and why.",
        "",
    ]
    words, section = _descriptions(), ""
    for kind, path, _, default in _walk(Settings(), Settings(), ""):
        parent, _, name = path.rpartition(".")
        if parent != section:
            section = parent
            lines += [f"[{section}]", ""]
        lines += [f"# {line}" for line in words[kind, name].splitlines()]
        lines += [f"# {name} = {_toml(default)}", ""]
    return "\n".join(lines)


def _walk(value: Section, default: Section, prefix: str) -> Iterator[tuple[str, str, Any, Any]]:
    """(class of the section, path, value, default) of each field; plain fields first, as TOML wants them."""
    fields = [(name, getattr(value, name), getattr(default, name)) for name in type(value).__struct_fields__]
    for name, this, other in fields:
        if not isinstance(this, Section):
            plain = msgspec.to_builtins(this), msgspec.to_builtins(other)
            yield type(value).__name__, f"{prefix}{name}", *plain
    for name, this, other in fields:
        if isinstance(this, Section):
            yield from _walk(this, other, f"{prefix}{name}.")


def _descriptions() -> dict[tuple[str, str], str]:
    """{(class, field): its docstring on one line}"""
    words = {}
    for node in ast.parse(inspect.getsource(definitions)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                told = text.value if isinstance(text, ast.Expr) else None
                words[node.name, field.target.id] = (
                    " ".join(str(told.value).split()) if isinstance(told, ast.Constant) else ""
                )
    return words


def _file_paths(path: Path) -> frozenset[str]:
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return frozenset()
    return frozenset(_paths(tree, ""))


def _paths(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")


def _origin(path: str, in_file: frozenset[str], environ: Mapping[str, str]) -> Origin:
    """A whole table in the environment or the file counts for the setting that holds it."""
    named = {setting_of(name, Settings.__struct_fields__) for name in environ}
    if any(name == path or name.startswith(f"{path}.") for name in named if name):
        return "environment"
    return "file" if path in in_file else "default"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(name)} = {_toml(item)}" for name, item in value.items()) + " }"
    return json.dumps(value)
