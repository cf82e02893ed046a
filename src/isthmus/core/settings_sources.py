"""What a settings file and the variables of an environment say, as one tree for `settings.load` to type.

`ISTHMUS_LEASING__LEASE_S` is leasing.lease_s, `ISTHMUS_PLATFORM` is platform, and `ISTHMUS_STATE`, the same
word as `--state`, is state_dir. A variable that looks like a setting and is none is refused with what was
meant. A relative path in the file is taken from the file's directory, one in a variable from the working
directory.
"""

import difflib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from isthmus.core.errors import SettingsError

PREFIX = "ISTHMUS_"
STATE_VARIABLE = "ISTHMUS_STATE"

_PATHS = (
    "state_dir", "cache_dir", "policy.file", "policy.signals", "node.cache_path", "slurm.ssh.config",
    "slurm.rest.token_file",
)  # fmt: skip


def read_file(path: Path) -> dict[str, Any]:
    """The file's tree. Raises FileNotFoundError, SettingsError."""
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{path}: {error}") from error
    for dotted in _PATHS:
        try:
            _anchor(tree, dotted.split("."), path.absolute().parent)
        except RuntimeError as error:  # ~ of a user that does not exist
            raise SettingsError(f"{path}: {dotted}: {error}") from error
    return tree


def _anchor(tree: dict[str, Any], names: list[str], directory: Path) -> None:
    *sections, field = names
    branch: object = tree
    for section in sections:
        branch = branch.get(section) if isinstance(branch, dict) else None
    value = branch.get(field) if isinstance(branch, dict) else None
    if isinstance(branch, dict) and isinstance(value, str) and value and "://" not in value:
        branch[field] = str(directory / Path(value).expanduser())


def overlay(tree: dict[str, Any], environ: Mapping[str, str], fields: Collection[str]) -> None:
    """Put the variables' values into the tree.

    fields  names of the outermost table: plain settings and sections
    raises  SettingsError for a variable that nearly is a setting
    """
    for name, value in environ.items():
        path = setting_of(name, fields)
        if path is None:
            _refuse_if_misspelt(name, fields)
            continue
        *sections, field = path.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise SettingsError(f"{name}: {section} is a value and no section")
        branch[field] = value


def setting_of(name: str, fields: Collection[str]) -> str | None:
    """Path of the setting that a variable of this name gives, like `leasing.lease_s`; None: it gives none."""
    if name == STATE_VARIABLE:
        return "state_dir"
    if not name.startswith(PREFIX):
        return None
    path = name.removeprefix(PREFIX).lower().replace("__", ".")
    return path if "." in path or path in fields else None


def _refuse_if_misspelt(name: str, fields: Collection[str]) -> None:
    """Other variables with our prefix are other people's, or ours but no settings: they pass."""
    if not name.startswith(PREFIX):
        return
    word = name.removeprefix(PREFIX).lower()
    section, _, rest = word.partition("_")
    if section in fields and rest:
        meant = f"{PREFIX}{section}__{rest}".upper()
        raise SettingsError(
            f"{name} sets nothing: two underscores stand between a section and its setting, as in {meant}"
        )
    for near in difflib.get_close_matches(word, fields, 1, 0.8):
        raise SettingsError(f"{name} sets nothing; did you mean {PREFIX}{near.upper()}?")
