"""The fingerprint of a component's code, for its cache key.

TFX's cache key has the dotted path of a component's executor or function, not the code behind it:
without a fingerprint, edited code would leave its old results in use. Every component passes one,
so that editing any module that it imports, directly or not, runs it anew, and no other component.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

CODE_KEY = "code"

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("components", "dataset", "serving", "trainer")
# Their versions count as code: another line of TFX in the same place starts anew. JAX's does not,
# which need not be where a pipeline is compiled.
_LIBRARIES = (
    *("tensorflow", "keras", "tensorflow-transform"),
    *("numpy", "pillow", "pyarrow"),  # they decide about the pixels
    *("ai-edge-litert", "tf2onnx", "onnx"),
)


def fingerprint(*names: str) -> str:
    """Identifies the code of modules and of all that they import of this project.

    Args:
      *names: Dotted names of modules or packages; a package stands for every module below it.

    Returns:
      16 hexadecimal digits.

    Raises:
      ModuleNotFoundError: There is no such module.
    """
    digest = hashlib.sha256()
    for library in _LIBRARIES:
        try:
            digest.update(f"{library} {metadata.version(library)}\0".encode())
        except metadata.PackageNotFoundError:
            continue
    for file in sorted(_closure(names)):
        digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _closure(names: tuple[str, ...]) -> set[Path]:
    found: set[Path] = set()
    todo = [file for name in names for file in _files(name)]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += [path for name in _imports(file) if (path := _module(name))]
    return found


def _files(name: str) -> list[Path]:
    """The module of this name, or all modules of the package of this name."""
    module = _module(name)
    if module is None:
        raise ModuleNotFoundError(f"there is no module {name!r} in {_ROOT}")
    return [*module.parent.rglob("*.py")] if module.name == "__init__.py" else [module]


def _module(name: str) -> Path | None:
    path = _ROOT.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@functools.cache
def _imports(file: Path) -> tuple[str, ...]:
    """What a module imports of this project, in functions too; names that are no modules, too."""

    def names() -> Iterator[str]:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    return tuple(name for name in names() if name.partition(".")[0] in _PACKAGES)
