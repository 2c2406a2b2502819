"""What a module pulls in, each in a process of its own: importing TFX takes 10 s and more."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support import patience

ROOT = Path(__file__).resolve().parents[1]
TFX = ("tfx", "apache_beam", "ml_metadata")
TENSORFLOW = ("tensorflow", "keras", *TFX)

PROGRAM = """
import importlib, json, runpy, sys
kind, *names = json.loads(sys.argv.pop())
if kind == "import":
    for name in names:
        importlib.import_module(name)
else:
    sys.argv[:] = names
    try:
        runpy.run_module(names[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
# Modules that were run themselves: serving.protos imports messages from below `tensorflow` alone.
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def imported(*what: str, backend: str = "tensorflow") -> list[str]:
    """Top-level modules in a process after `import`ing modules or `run`ning one with arguments."""
    process = patience.run(
        [sys.executable, "-c", PROGRAM, json.dumps(what)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": backend},
        cpu_seconds=120,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def modules(folder: str) -> list[str]:
    """Every module of a folder."""
    paths = (ROOT / folder).rglob("*.py")
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if path.name != "__init__.py"
    ]


@pytest.mark.parametrize(
    ("names", "present", "absent"),
    [
        pytest.param(modules("dataset"), "numpy", TENSORFLOW, id="dataset"),
        pytest.param(["pipeline.config"], "trainer", TENSORFLOW, id="pipeline.config"),
        pytest.param(["pipeline.local_runner"], "pipeline", TENSORFLOW, id="pipeline.local_runner"),
        # TensorFlow only when it classifies, so that errors in the arguments come at once.
        pytest.param(["dataset.images"], "PIL", (*TENSORFLOW, "serving"), id="dataset"),
        pytest.param(["serving.predict"], "serving", (*TENSORFLOW, "trainer"), id="serving"),
        pytest.param(
            ["serving.client", "serving.load_test.__main__"],
            "grpc",
            (*TENSORFLOW, "trainer"),
            id="client",
        ),
        pytest.param(
            ["serving.server.lifecycle", "serving.server.__main__"],
            "tensorflow",
            (*TFX, "trainer"),
            id="server",
        ),
        pytest.param(
            [*modules("trainer/network"), "trainer.optimizer", "trainer.presets"],
            "keras",
            TFX,
            id="network",
        ),
        # Not even trainer.run, which TFX calls.
        pytest.param(modules("trainer"), "tensorflow_transform", ("tfx",), id="trainer"),
    ],
)
def test_imports(names: list[str], present: str, absent: tuple[str, ...]):
    assert len(names) >= 1
    found = imported("import", *names)
    assert present in found
    assert [name for name in absent if name in found] == []


def test_training_with_jax_imports_no_tensorflow():
    found = imported("import", *modules("trainer/on_jax"), backend="jax")
    assert {"jax", "keras", "trainer"} <= set(found)
    assert [name for name in ("tensorflow", "tensorflow_transform", *TFX) if name in found] == []


def test_what_is_shared_with_the_process_of_jax_imports_neither():
    found = imported("import", "trainer.on_jax.process", "trainer.engines")
    assert [name for name in ("jax", *TENSORFLOW) if name in found] == []


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.local_runner",
        "serving.client",
        "serving.load_test",
        "serving.predict",
        "serving.server",
    ],
)
def test_help_is_at_hand(module: str):
    found = imported("run", module, "--help")
    assert [name for name in TENSORFLOW if name in found] == []
