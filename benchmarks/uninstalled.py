"""Imports `omni` from the working tree on a machine where it and some packages are not installed.

`import uninstalled` puts this checkout on the path of this process and of those it starts. Packages
that only read and write video files may be missing: what replaces them can be imported, and raises
`ImportError` when it is called. Also a pytest plugin: `-p uninstalled`.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["REPO", "REPLACED", "Replacements"]

REPO = Path(__file__).resolve().parents[1]
"""Root of this checkout."""

REPLACED = ("av", "imageio_ffmpeg")
"""Packages that are replaced where they are missing."""


class _Replacement(types.ModuleType):
    """A module of a missing package; every name in it is a class that cannot be made."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        package = self.__name__.partition(".")[0]

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise ImportError(f"{package} is not installed here")

        return type(name, (Exception,), {"__new__": refuse})


class Replacements(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of REPLACED; asked last, so that an installed package is found before."""

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A module without content, if it is of a replaced package."""
        if fullname.partition(".")[0] not in REPLACED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make it."""
        return _Replacement(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def _prepare() -> None:
    folders = [str(REPO), str(REPO / "benchmarks")]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([*folders, *filter(None, before)])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.meta_path.append(Replacements())


_prepare()
