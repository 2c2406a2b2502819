"""Runs the compiled pipeline with the real image in local containers: no cluster, KFP's own runner.

    python kubeflow/run_docker.py pipeline.yaml --data cifar-100-binary --param epochs=1

Needs Docker, or podman's service in its place (DOCKER_HOST=unix:///path/to/socket), and the image
that the package names. The package has to be compiled without a volume (kubeflow/runner.py
--volume ""), which there is none of: everything is in one folder, --root, at the same path inside.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from pipeline.kubeflow.package import Package, PackageError


def _runner(shared_memory: str) -> object:
    """KFP's local runner for Docker.

    Raises:
      PackageError: This version of kfp has none that loads what TFX compiles.
    """
    try:
        import docker
        from kfp import local

        # Seconds without a line of a container's log; a training has longer ones than 60.
        docker.client.DEFAULT_TIMEOUT_SECONDS = 86400
        # As the caller: what containers write belongs to who started them.
        user = f"{os.getuid()}:{os.getgid()}"
        runner = local.DockerRunner(user=user, shm_size=shared_memory)
        docker.from_env().ping()
    except (ImportError, AttributeError, TypeError) as error:
        raise PackageError(
            f"kfp 2.16 or newer and docker are needed ({error}): the TFX 1.21 line has them."
        ) from error
    except docker.errors.DockerException as error:
        raise PackageError(
            f"no container engine answers: {error}. Start Docker, or "
            "`podman system service --time=0 unix:///tmp/podman.sock` with "
            "DOCKER_HOST=unix:///tmp/podman.sock."
        ) from error
    return runner


def run(package: Package, root: Path, data: Path, texts: Sequence[str], shared_memory: str) -> Path:
    """Runs every task of a package in a container.

    Args:
      package: What to run.
      root: Folder for everything; containers see it, and nothing else of this machine.
      data: What `dataset.source` opens, copied into `root`.
      texts: Parameters, NAME=VALUE.
      shared_memory: Size of /dev/shm, such as 1g.

    Returns:
      The folder that models are pushed into.

    Raises:
      PackageError: Something is missing.
      RuntimeError: A task has failed; its log has gone to the standard output.
    """
    model_name = Path(package.parameters.get("serving_dir", {}).get("defaultValue", "model")).name
    places = {
        "data": root / "data",
        "serving_dir": root / "serving_models" / model_name,
        "checkpoint_dir": root / "checkpoints",
    }
    given = [f"{name}={path}" for name, path in places.items()]
    arguments = package.arguments([*given, *texts])
    if not (data / "train.bin").is_file():
        raise PackageError(f"--data {data}: there is no train.bin in it.")
    runner = _runner(shared_memory)
    import docker
    from kfp import components, local

    for path in places.values():
        path.mkdir(parents=True, exist_ok=True)
    shutil.copytree(data, places["data"], dirs_exist_ok=True)
    local.init(runner=runner, pipeline_root=str(root), raise_on_error=True)
    try:
        components.load_component_from_file(str(package.path))(**arguments)
    except (docker.errors.DockerException, OSError) as error:  # such as an image that is not there
        raise RuntimeError(f"the container engine: {error}") from error
    return places["serving_dir"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 1 where a task has failed, 2 where something is missing."""
    parser = argparse.ArgumentParser(
        prog="python kubeflow/run_docker.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", type=Path, help="what kubeflow/runner.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder in the binary layout")
    parser.add_argument("--root", type=Path, default=Path("output/kubeflow"))
    parser.add_argument("--param", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--shared_memory", default="1g", help="of each container (default: 1g)")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    try:
        root = args.root.absolute()
        pushed = run(Package(args.package), root, args.data, args.param, args.shared_memory)
    except PackageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    models = sorted(str(path.parent) for path in pushed.glob("**/saved_model.pb"))
    print(f"pushed: {', '.join(models) or 'nothing'}")


if __name__ == "__main__":
    main()
