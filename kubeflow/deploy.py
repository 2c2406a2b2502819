"""Uploads the compiled pipeline to Kubeflow Pipelines, runs it, and says how it went.

    python kubeflow/deploy.py run pipeline.yaml --endpoint http://localhost:8888 --param epochs=20
    python kubeflow/deploy.py schedule pipeline.yaml --cron "0 0 3 * * 1" --name weekly
    python kubeflow/deploy.py upload pipeline.yaml
    python kubeflow/deploy.py wait RUN_ID

Exit codes: 0 done, 1 the run failed, 2 bad command line or package, 3 the API cannot be reached or
refuses, 4 the time to wait is over (the run goes on).
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.kubeflow.api import FAILED, USAGE, Api, DeployError, failure, wait
from pipeline.kubeflow.package import Package, PackageError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python kubeflow/deploy.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    api = argparse.ArgumentParser(add_help=False)
    api.add_argument(
        "--endpoint",
        default=os.environ.get("KF_PIPELINES_ENDPOINT"),
        metavar="URL",
        help="the API, such as http://localhost:8888; default: $KF_PIPELINES_ENDPOINT",
    )
    api.add_argument("--namespace", metavar="NAME", help="the user's, in multi-user mode")
    api.add_argument("--token", metavar="TEXT", help="bearer token; better --token_file")
    api.add_argument(
        "--token_file",
        type=Path,
        metavar="FILE",
        help="file with a bearer token; default: the token in $KF_PIPELINES_TOKEN, or none",
    )
    api.add_argument("--ca_cert", metavar="FILE", help="authority of the API's certificate, PEM")
    package = argparse.ArgumentParser(add_help=False)
    package.add_argument("package", type=Path, help="what kubeflow/runner.py wrote")
    package.add_argument("--pipeline", metavar="NAME", help="default: the package's")
    package.add_argument("--version", metavar="NAME", help="default: from the contents")
    job = argparse.ArgumentParser(add_help=False)
    job.add_argument("--param", action="append", default=[], metavar="NAME=VALUE")
    job.add_argument("--name", metavar="TEXT", help="the run's; default: pipeline and time")
    job.add_argument("--experiment", default="vit", metavar="NAME", help="(default: vit)")
    job.add_argument("--service_account", default="vit-pipeline", help="(default: vit-pipeline)")
    job.add_argument(
        "--pipeline_root",
        metavar="URI",
        help="default: the package's --root; \"\" for the installation's",
    )
    waiting = argparse.ArgumentParser(add_help=False)
    waiting.add_argument(
        "--timeout", type=float, default=86400.0, metavar="S", help="(default: a day)"
    )
    waiting.add_argument("--interval", type=float, default=10.0, metavar="S", help="(default: 10)")
    waiting.add_argument(
        "--pod_namespace", metavar="NAME", help="for logs; default: --namespace or kubeflow"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", parents=[package, api, job, waiting], help="upload, run, wait")
    run.add_argument("--no_wait", action="store_true", help="come back at once")
    run.add_argument(
        "--ui_endpoint",
        default=os.environ.get("KF_PIPELINES_UI_ENDPOINT"),
        metavar="URL",
        help="the user interface, for a link; default: $KF_PIPELINES_UI_ENDPOINT, or no link",
    )
    commands.add_parser("upload", parents=[package, api], help="upload, if it is not there")
    schedule = commands.add_parser(
        "schedule", parents=[package, api, job], help="upload, and run again and again"
    )
    when = schedule.add_mutually_exclusive_group(required=True)
    when.add_argument(
        "--cron", help='six fields, seconds first: "0 0 3 * * 1", Mondays at 3:00 UTC'
    )
    when.add_argument("--every", type=int, metavar="S", help="seconds between starts")
    waiter = commands.add_parser("wait", parents=[api, waiting], help="wait for a run")
    waiter.add_argument("run_id")
    return parser


def _execute(args: argparse.Namespace) -> None:
    package = Package(args.package) if "package" in args else None
    arguments = package.arguments(args.param) if package and "param" in args else {}
    if args.command == "schedule" and package and package.fixed_data:
        raise DeployError(
            f"{package.path} has its data's fingerprint from the run's parameters, which are the "
            "same in each run of a schedule: all but the first would take everything from the "
            "cache. Compile it with kubeflow/runner.py --fingerprint_in_run, or --no_cache.",
            USAGE,
        )
    if not args.endpoint or not args.endpoint.startswith(("http://", "https://")):
        raise DeployError(
            f"--endpoint is {args.endpoint}: give the API's http:// or https:// address.", USAGE
        )
    try:
        token = args.token or (args.token_file and args.token_file.read_text().strip())
    except OSError as error:
        raise DeployError(f"--token_file {args.token_file}: {error.strerror}.", USAGE) from error
    token = token or os.environ.get("KF_PIPELINES_TOKEN")
    api = Api(args.endpoint.rstrip("/"), args.namespace, token, args.ca_cert)
    if package is None:
        _wait(api, args.run_id, [], args)
        return
    version = api.check()
    name = args.pipeline or package.name
    pipeline_id, version_id = api.upload(package.path, name, args.version or package.version)
    if args.command == "upload":
        return
    common = {
        "experiment_id": api.experiment(args.experiment),
        "job_name": args.name or f"{name} {datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        "params": arguments,
        "pipeline_id": pipeline_id,
        "version_id": version_id,
        # No backend reads the package's.
        "pipeline_root": package.root if args.pipeline_root is None else args.pipeline_root,
        "service_account": args.service_account,
    }
    if args.command == "schedule":
        if version and (2, 4) <= version < (2, 17):  # mended by pull request 13325
            print(
                f"Kubeflow Pipelines {version[0]}.{version[1]} ignores the service account of "
                "schedules: the runs' pods will have the installation's default, not "
                f"{args.service_account}",
                flush=True,
            )
        made = api.call(
            api.client.create_recurring_run,
            cron_expression=args.cron,
            interval_second=args.every,
            max_concurrency=1,
            no_catchup=True,
            **common,
        )
        print(f"recurring run {made.display_name}: {made.recurring_run_id}")
        return
    run = api.call(api.client.run_pipeline, **common)
    # The interface is another service than the API, on a port of its own.
    link = args.ui_endpoint and f": {args.ui_endpoint.rstrip('/')}/#/runs/details/{run.run_id}"
    print(f"run {run.run_id}{link or ''}", flush=True)
    if not args.no_wait:
        _wait(api, run.run_id, package.tasks, args)


def _wait(api: Api, run_id: str, tasks: Sequence[str], args: argparse.Namespace) -> None:
    run = wait(api, run_id, tasks, args.timeout, args.interval)
    if run["state"] != "SUCCEEDED":
        namespace = args.pod_namespace or args.namespace or "kubeflow"
        raise DeployError(failure(run, run_id, namespace, tasks), FAILED)
    print(f"run {run_id}: succeeded")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point; see the module's docstring for the exit codes."""
    try:
        _execute(_parser().parse_args(arguments))
    except (DeployError, PackageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code if isinstance(error, DeployError) else USAGE)
    except KeyboardInterrupt:
        print("interrupted; a run that was started goes on.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
