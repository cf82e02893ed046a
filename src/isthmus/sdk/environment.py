"""The environment a caller runs in, so that its functions find the same modules on an executor.

Not here: building an environment (`isthmus.node`).
"""

import os
import site
import sys
import sysconfig

from isthmus.core.model import Environment


def capture() -> Environment:
    """This interpreter, and every import directory that it would not have by itself, the current one
    included.
    """
    own = _own_directories()
    directories = dict.fromkeys(os.path.abspath(entry) for entry in (*sys.path, os.getcwd()))
    extra = tuple(entry for entry in directories if entry not in own and os.path.exists(entry))
    return Environment(python=sys.executable, sys_path=extra)


def complete(environment: Environment) -> Environment:
    """An environment named by the user, with the caller's import directories where it says none."""
    caller = capture()
    return Environment(
        python=environment.python or ("" if environment.requirements else caller.python),
        sys_path=environment.sys_path or caller.sys_path,
        requirements=environment.requirements,
        preload=environment.preload,
    )


def _own_directories() -> frozenset[str]:
    standard = sysconfig.get_paths()
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    directories = [standard[name] for name in names if name in standard]
    directories += [os.path.join(directory, "lib-dynload") for directory in directories[:2]]
    directories += [*site.getsitepackages(), site.getusersitepackages()]
    version = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    directories.append(os.path.join(os.path.dirname(standard["stdlib"]), version))
    return frozenset(os.path.abspath(entry) for entry in directories)
