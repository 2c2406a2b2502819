"""setup.py, and its agreement with the lock files under requirements/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = {
    "3.10": "tfx-1.16-py310",
    "3.11": "tfx-1.21-py311",
    "3.12": "tfx-1.21-py312",
    "3.13": "tfx-1.21-py313",
}
ALL_LOCKS = [f"{stem}{kind}" for stem in LOCKS.values() for kind in ("", "-gpu")]


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> Iterator[setuptools.Distribution]:
    """What setup.py declares."""
    from distutils.core import run_setup

    monkeypatch.chdir(ROOT)
    yield run_setup("setup.py", stop_after="init")


def pins(stem: str) -> dict[str, Version]:
    """The versions in a lock file, by canonical name."""
    text = (ROOT / "requirements" / f"{stem}.txt").read_text()
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+) \\$", text, flags=re.M)
    return {canonicalize_name(name): Version(version) for name, version in found}


@pytest.mark.parametrize("stem", ALL_LOCKS)
def test_a_lock_file_pins_everything_with_hashes(stem: str) -> None:
    text = (ROOT / "requirements" / f"{stem}.txt").read_text()
    requirements = re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"^ *#.*\n", "", text, flags=re.M))
    assert len(requirements) == len(pins(stem)) > 10
    for requirement in requirements:
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n*", requirement), (
            requirement
        )


@pytest.mark.parametrize("stem", ALL_LOCKS)
def test_a_lock_file_names_no_registry_and_no_place_on_a_machine(stem: str) -> None:
    text = (ROOT / "requirements" / f"{stem}.txt").read_text()
    assert "://" not in text
    assert not re.search(r"(^|[\s'\"=])(/|~/|\.\./)", text)
    assert "index-url" not in text and "find-links" not in text


@pytest.mark.parametrize(("python", "stem"), LOCKS.items())
def test_every_requirement_of_setup_py_is_pinned_within_its_range(
    python: str, stem: str, distribution: setuptools.Distribution
) -> None:
    declared = [*distribution.install_requires]
    for extra in ("gpu", "kubeflow", "onnx", "test"):
        declared += distribution.extras_require[extra]
    locked = pins(stem)
    checked = set()
    for requirement in map(Requirement, declared):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {stem}.txt"
        assert requirement.specifier.contains(version), f"{requirement}: locked is {version}"
        checked.add(requirement.name)
    assert {"tfx", "tensorflow", "keras", "apache-beam", "kfp", "pytest"} <= checked


@pytest.mark.parametrize("stem", LOCKS.values())
def test_a_lock_file_holds_what_the_set_up_installs_with(stem: str) -> None:
    assert {"pip", "setuptools", "uv", "wheel"} <= set(pins(stem))


@pytest.mark.parametrize("stem", LOCKS.values())
def test_the_gpu_files_add_cuda_and_repeat_nothing(stem: str) -> None:
    added = pins(f"{stem}-gpu")
    assert {"nvidia-cudnn-cu12", "nvidia-cublas-cu12"} <= set(added)
    # JAX's plug-in is of JAX's own version, and takes that version of cuDNN alone.
    assert added["jax-cuda12-plugin"] == pins(stem)["jax"]
    assert added["nvidia-cudnn-cu12"].major == 9
    assert not set(added) & set(pins(stem))


@pytest.mark.parametrize("stem", LOCKS.values())
def test_the_image_leaves_out_tools_and_nothing_that_is_required(
    stem: str, distribution: setuptools.Distribution
) -> None:
    lines = (ROOT / "requirements" / f"{stem}-tools.txt").read_text().splitlines()
    tools = {canonicalize_name(line) for line in lines if not line.startswith("#")}
    assert {"pytest", "ruff", "mypy", "uv"} <= tools < set(pins(stem))
    required = [*distribution.install_requires, *distribution.extras_require["kubeflow"]]
    assert not tools & {canonicalize_name(Requirement(text).name) for text in required}


def test_the_python_range_is_that_of_the_lock_files(
    distribution: setuptools.Distribution,
) -> None:
    specifier = SpecifierSet(str(distribution.python_requires))
    inside = [f"3.{minor}" for minor in range(6, 20) if f"3.{minor}" in specifier]
    assert inside == list(LOCKS)


def test_every_package_on_disk_is_packaged(distribution: setuptools.Distribution) -> None:
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("pipeline", "components", "dataset", "trainer", "serving")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert {"pipeline", "components", "dataset", "trainer", "serving"} <= on_disk
    assert set(distribution.packages) == on_disk


def test_every_folder_with_code_is_a_package() -> None:
    for top in ("pipeline", "components", "dataset", "trainer", "serving"):
        for module in (ROOT / top).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module.parent} has no __init__.py"


@pytest.mark.parametrize("name", ["vit-pipeline", "vit-predict"])
def test_a_console_script_leads_to_a_function(
    name: str, distribution: setuptools.Distribution
) -> None:
    scripts = dict(
        re.split(r"\s*=\s*", script) for script in distribution.entry_points["console_scripts"]
    )
    assert callable(EntryPoint(name, scripts[name], "console_scripts").load())


def test_data_files_in_the_packages_are_packaged(distribution: setuptools.Distribution) -> None:
    on_disk = {
        path
        for top in ("pipeline", "components", "dataset", "trainer", "serving")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix in {".config", ".yaml", ".json"}
    }
    packaged = {
        path
        for package, patterns in distribution.package_data.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert on_disk
    assert on_disk <= packaged, f"not in setup.py's package_data: {sorted(on_disk - packaged)}"
