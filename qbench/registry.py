"""Baselines by name: entry points of installed packages, or one class in one file.

The built-in methods are found the same way as a third party's: through the entry-point group
``qbench.baselines``. ``path/to/my_method.py:MyMethod`` needs no installation; the hash of the file
then becomes part of the key, so that an edited method never meets its old results.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qbench.errors import QBenchError, unknown
from qbench.record import BaselineSpec

if TYPE_CHECKING:
    from qbench.baseline import Baseline

GROUP = "qbench.baselines"


class LoadedBaseline(NamedTuple):
    """An instance together with what identifies it in a key."""

    instance: Baseline
    spec: BaselineSpec


def baseline_entry_points() -> dict[str, EntryPoint]:
    """Every installed baseline by name, without importing any."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load_baseline(name: str, fields: Mapping[str, Any] | None = None) -> LoadedBaseline:
    """Construct a baseline from its name, or from ``file.py:Class``, and its fields.

    Raises:
        QBenchError: unknown name or field, a file that cannot be imported, or a class that is no
            baseline.
    """
    from qbench.baseline import with_fields

    if ".py:" in name:
        cls, source = _from_file(name)
        shown = name.rpartition(":")[2]
    else:
        points = baseline_entry_points()
        if name.endswith(".py"):
            raise QBenchError(f"{name} names no class; write file.py:Class, as in {name}:MyMethod")
        if name not in points:
            raise unknown("baseline", name, points)
        cls, source, shown = _from_entry_point(points[name]), None, name
    instance = with_fields(_checked(cls, name), fields or {})
    spec = BaselineSpec(
        name=shown, parameters=instance.parameters(), version=instance.version, source=source
    )
    return LoadedBaseline(instance, spec)


def _checked(cls: Any, name: str) -> type[Baseline]:
    from qbench.baseline import Baseline

    if not (isinstance(cls, type) and issubclass(cls, Baseline)):
        raise QBenchError(f"{name} is not a qbench.Baseline subclass; see README, 'Add a baseline'")
    missing: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
    if missing:
        raise QBenchError(f"{name} does not define {', '.join(sorted(missing))}")
    return cls


def _from_entry_point(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # somebody else's package may raise anything on import
        raise QBenchError(
            f"cannot import baseline {point.name!r} from {point.value}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _from_file(name: str) -> tuple[Any, str]:
    """Import ``path.py:Class`` under a private name; return the class and the file's hash."""
    path_text, _, class_name = name.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise QBenchError(f"no such baseline file: {path} (looked in {path.absolute().parent})")
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    module_name = f"_qbench_plugin_{digest[:16]}"
    if module_name in sys.modules:
        module = sys.modules[module_name]
    else:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up by name
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise QBenchError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    if not hasattr(module, class_name):
        tree = ast.parse(source)
        raise unknown(
            f"class in {path}",
            class_name,
            [n.name for n in tree.body if isinstance(n, ast.ClassDef)],
        )
    return getattr(module, class_name), digest
