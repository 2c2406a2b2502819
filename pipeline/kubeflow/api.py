"""Kubeflow Pipelines' API: upload, run, wait, and say why a run failed; kubeflow/deploy.py uses it.

Works with the clients of both lines, kfp 2.5 and 2.16. Cheap to import: the client itself is
imported when an `Api` is made.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import logging
import os
import re
import time
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

# Exit codes of kubeflow/deploy.py.
FAILED, USAGE, REFUSED, TIMED_OUT = 1, 2, 3, 4
# Seconds to connect and to wait for an answer; the API's client by itself would wait for ever.
_REQUEST_TIMEOUT = (5, 60)
# Seconds without an answer after which waiting for a run is given up.
_PATIENCE = 120
_LOG_LINES = 40
_FINAL = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "CACHED"}
# The drivers parse strictly. Those of 2.0 know neither imagePullPolicy nor tolerations (2.1), those
# of 2.2 no emptyDirMounts (kubernetes_platform/proto/kubernetes_executor_config.proto).
OLDEST = (2, 3)
# What the backend makes of each task, besides the task: "Trainer-driver", "executor".
_BACKEND = ("root", "driver", "executor")
_T = TypeVar("_T")


class DeployError(Exception):
    """Something that ends the command: a message, and the exit code."""

    def __init__(self, message: str, code: int = REFUSED) -> None:
        super().__init__(message)
        self.code = code


class NoAnswer(DeployError):
    """The API cannot be reached, now."""


class Api:
    """Kubeflow Pipelines' API, with errors that say what to do.

    Args:
      endpoint: Where it is, http:// or https://.
      namespace: The user's, in multi-user mode.
      token: A bearer token.
      ca_cert: The authority of its certificate, PEM.
    """

    def __init__(
        self, endpoint: str, namespace: str | None, token: str | None, ca_cert: str | None
    ) -> None:
        warnings.filterwarnings("ignore")
        import kfp
        from kfp_server_api import rest

        request = rest.RESTClientObject.request

        def impatient(*args: Any, _request_timeout: Any = None, **options: Any) -> Any:
            return request(*args, _request_timeout=_request_timeout or _REQUEST_TIMEOUT, **options)

        rest.RESTClientObject.request = impatient
        # That each connection was tried again; what comes of it is said by `call`.
        logging.getLogger("urllib3").setLevel(logging.ERROR)

        class Client(kfp.Client):
            def get_kfp_healthz(self, *args: Any, **options: Any) -> Any:
                """Asked by the constructor, for minutes if need be; the first call will tell."""
                return types.SimpleNamespace(multi_user=False)

        self.endpoint = endpoint
        self.namespace = namespace
        self.client = Client(
            host=endpoint, namespace=namespace, existing_token=token, ssl_ca_cert=ca_cert
        )

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Asks for an object, as JSON: the clients of both lines lack fields of newer servers.

        Args:
          path: Below the API's root, such as `runs/ID`.
          **query: The query's parameters.

        Raises:
          DeployError: There is no answer, or a refusal.
        """
        return self.call(
            self.client._run_api.api_client.call_api,
            f"/apis/v2beta1/{path}",
            "GET",
            query_params=list(query.items()),
            header_params={"Accept": "application/json"},
            response_type="object",
            auth_settings=["Bearer"],
            _return_http_data_only=True,
        )

    def check(self) -> tuple[int, int] | None:
        """Makes sure that the installation can run what kubeflow/runner.py compiles.

        Returns:
          Its version, major and minor; None if it does not say it.

        Raises:
          DeployError: It is too old, or has several users and no namespace was given.
        """
        health = self.get("healthz")
        version = str(health.get("tag_name") or "unknown")
        oldest = ".".join(map(str, OLDEST))
        match = re.match(r"v?(\d+)\.(\d+)", version)
        number = (int(match[1]), int(match[2])) if match else None
        if number is None:
            print(
                f"{self.endpoint} says its version is {version!r}: {oldest} or newer is needed",
                flush=True,
            )
        elif number < OLDEST:
            raise DeployError(
                f"{self.endpoint} is Kubeflow Pipelines {version}, which refuses parts of the "
                f"package in each task (emptyDirMounts): {oldest} or newer is needed."
            )
        if health.get("multi_user") and not self.namespace:
            raise DeployError(
                f"{self.endpoint} has several users: give your --namespace (the profile's name).",
                USAGE,
            )
        return number

    def call(self, function: Callable[..., _T], *args: Any, **options: Any) -> _T:
        """Calls one of the client's methods, without what it prints.

        Raises:
          DeployError: There is no answer, or a refusal.
        """
        import kfp_server_api
        import urllib3

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return function(*args, **options)
        except kfp_server_api.ApiException as error:
            raise DeployError(self._explain(error)) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            cause = getattr(error, "reason", None) or error
            raise NoAnswer(
                f"{self.endpoint} does not answer: {cause}. Is it Kubeflow Pipelines' address? "
                "For one inside a cluster: kubectl port-forward -n kubeflow svc/ml-pipeline 8888."
            ) from error

    def _explain(self, error: Any) -> str:
        said = " ".join(str(error.body or error.reason).split())[:500]
        advice = {
            401: "Give a token that is valid: --token_file, or KF_PIPELINES_TOKEN.",
            403: f"The token may not do this in the namespace {self.namespace or '(none given)'}: "
            "see kubeflow/manifests/base/deployer.yaml, and --namespace.",
            404: "It does not exist, or this is not Kubeflow Pipelines 2.",
        }.get(error.status, "The log of the deployment ml-pipeline may say more.")
        return f"{self.endpoint} answered {error.status}: {said}\n{advice}"

    def upload(self, path: Path, name: str, version: str) -> tuple[str, str]:
        """Makes sure that a package is there: as a new pipeline, or as a version of one.

        Args:
          path: The package.
          name: The pipeline's name.
          version: The version's name.

        Returns:
          The pipeline's id and the version's.
        """
        # Not the client's get_pipeline_id, which looks at pipelines without a namespace alone.
        predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
        found = self.call(
            self.client.list_pipelines,
            filter=json.dumps({"predicates": [predicate]}),
            namespace=self.namespace,
        ).pipelines
        if found:
            pipeline_id = found[0].pipeline_id
        else:
            pipeline = self.call(
                self.client.upload_pipeline, str(path), name, namespace=self.namespace
            )
            pipeline_id = pipeline.pipeline_id
            print(f"pipeline {name}: new, {pipeline_id}", flush=True)
        for known in self._versions(pipeline_id):
            if known.display_name == version:
                print(f"version {version}: there already, {known.pipeline_version_id}", flush=True)
                return pipeline_id, known.pipeline_version_id
        uploaded = self.call(
            self.client.upload_pipeline_version, str(path), version, pipeline_id=pipeline_id
        )
        print(f"version {version}: uploaded, {uploaded.pipeline_version_id}", flush=True)
        return pipeline_id, uploaded.pipeline_version_id

    def _versions(self, pipeline_id: str) -> list[Any]:
        versions: list[Any] = []
        token = ""
        while True:
            page = self.call(
                self.client.list_pipeline_versions, pipeline_id, page_token=token, page_size=100
            )
            versions += page.pipeline_versions or []
            token = page.next_page_token or ""
            if not token:
                return versions

    def experiment(self, name: str) -> str:
        """Finds or makes an experiment, and returns its id."""
        made = self.call(self.client.create_experiment, name, namespace=self.namespace)
        return made.experiment_id


def wait(
    api: Api, run_id: str, tasks: Sequence[str], timeout: float, interval: float
) -> dict[str, Any]:
    """Waits for the end of a run, and prints each task's progress.

    Args:
      api: Where it runs.
      run_id: Which.
      tasks: The tasks to report; empty for all but the backend's own.
      timeout: Seconds after which to give up.
      interval: Seconds between questions.

    Returns:
      The run, with its tasks.

    Raises:
      DeployError: The time is over, or the API refuses or stays silent.
    """
    started = heard = time.monotonic()
    states: dict[str, str] = {}
    while True:
        try:
            # Servers without ML Metadata leave the tasks out otherwise; others ignore it.
            run = api.get(f"runs/{run_id}", view="FULL")
            heard = time.monotonic()
        except NoAnswer as error:
            if time.monotonic() - heard > _PATIENCE:
                raise DeployError(f"{error}\nThe run {run_id} goes on.") from error
            run = {}
        _report(run, tasks, states)
        if run.get("state") in _FINAL:
            return run
        if time.monotonic() - started > timeout:
            raise DeployError(
                f"{run_id} is not done after {timeout:.0f} s; it goes on. "
                f"Wait on with: deploy.py wait {run_id}",
                TIMED_OUT,
            )
        time.sleep(interval)


def _tasks(run: dict[str, Any], names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """A run's tasks with their names, in the order of their starts; none of the backend's own."""
    # Up to 2.17 the first, then the second.
    details = run.get("run_details", {}).get("task_details") or run.get("tasks") or []
    named = [(task.get("display_name") or task.get("name", ""), task) for task in details]
    return sorted(
        ((name, task) for name, task in named if _is_task(name, names)),
        key=lambda pair: str(pair[1].get("start_time") or pair[1].get("create_time") or ""),
    )


def _message(task: dict[str, Any]) -> str:
    found = task.get("status_metadata") or task.get("error") or {}
    return " ".join(str(found.get("message") or "").split())


def _report(run: dict[str, Any], tasks: Sequence[str], states: dict[str, str]) -> None:
    for name, task in _tasks(run, tasks):
        state = task.get("state") or "RUNTIME_STATE_UNSPECIFIED"
        if state == "RUNTIME_STATE_UNSPECIFIED" or states.get(name) == state:
            continue
        states[name] = state
        took = ""
        start, end = task.get("start_time") or task.get("create_time"), task.get("end_time")
        if state in _FINAL and start and end:
            took = f"  {(_time(end) - _time(start)).total_seconds():.0f} s"
        message = f"  {_message(task)}".rstrip()
        clock = datetime.datetime.now().strftime("%H:%M:%S")
        print(f"{clock}  {name:<20}  {state.lower()}{took}{message}", flush=True)


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text[:19])  # UTC, without the fraction of a second


def _is_task(name: str, tasks: Sequence[str]) -> bool:
    return name in tasks if tasks else name.split("-")[-1] not in _BACKEND


def failure(run: dict[str, Any], run_id: str, namespace: str, tasks: Sequence[str]) -> str:
    """Says why a run failed: what the API knows, and the end of the failed tasks' logs.

    Args:
      run: The run.
      run_id: Its id.
      namespace: Where its pods are.
      tasks: The pipeline's tasks, to name the pods by.
    """
    lines = [f"run {run_id}: {run['state'].lower()}"]
    lines += [(run.get("error") or {}).get("message") or ""]
    lines += [
        f"{name}: {_message(task)}" if _message(task) else ""
        for name, task in _tasks(run, tasks)
        if task.get("state") == "FAILED"
    ]
    lines = [line for line in lines if line]
    try:
        import kubernetes

        try:
            kubernetes.config.load_incluster_config()
        except kubernetes.config.ConfigException:
            kubernetes.config.load_kube_config(config_file=os.environ.get("KUBECONFIG"))
        core = kubernetes.client.CoreV1Api()
        pods = core.list_namespaced_pod(
            namespace,
            label_selector=f"pipeline/runid={run_id}",
            _request_timeout=_REQUEST_TIMEOUT,
        ).items
        for pod in pods:
            if pod.status.phase != "Failed":
                continue
            node = (pod.metadata.annotations or {}).get("workflows.argoproj.io/node-name", "")
            names = [part for part in node.split(".")[1:] if _is_task(part, tasks)]
            task = names[0] if names else "a task"
            lines.append(
                f"-- {task} failed{_killed(pod.status)}; the end of {pod.metadata.name}'s log:"
            )
            log = core.read_namespaced_pod_log(
                pod.metadata.name,
                namespace,
                container="main",
                tail_lines=_LOG_LINES,
                _request_timeout=_REQUEST_TIMEOUT,
            )
            lines.append(log.rstrip())
    except Exception as error:  # whatever it is, the run's failure is the news
        lines.append(
            f"(no logs: {' '.join(str(error).split())[:300]}\n"
            f" kubectl logs -n {namespace} -l pipeline/runid={run_id} -c main --tail={_LOG_LINES})"
        )
    return "\n".join(lines)


def _killed(status: Any) -> str:
    """Why a container ended that did not end by itself: its log does not say it."""
    if status.reason:  # of the pod, such as Evicted
        return f" ({status.reason}: {status.message})"
    ends = [container.state.terminated for container in status.container_statuses or []]
    # A signal's number and 128; Kubernetes's reason, such as OOMKilled, is "Error" otherwise.
    killed = [end for end in ends if end and end.exit_code and end.exit_code > 128]
    return f" ({killed[0].reason}, exit code {killed[0].exit_code})" if killed else ""
