"""A stand-in for a cluster: real HTTP on loopback, with the part of two APIs that deploy.py uses.

Kubeflow Pipelines' v2beta1 API (as its clients of both lines call it), and Kubernetes's pods and
logs. It keeps what it is told, and notes every request. Namespaces count in multi-user mode alone,
as in ReplaceNamespace of the API server's resource_manager.go.
"""

from __future__ import annotations

import email
import email.policy
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BASE = "/apis/v2beta1"


class Cluster:
    """The state, and the server on a port of its own. Use it in a `with` statement.

    Attributes:
      requests: (method, path, query, body) of each request.
      states: (run's state, state of each task) at each question after it; the last one stays.
      messages: What there is to say about tasks, by name.
      token: Demanded of every request, if any.
      status: Answered instead of anything else, if set.
      silent: How many of the next requests find their connection closed.
      pods: Kubernetes's, by name: (labels, annotations, phase, log).
      ended: Of pods, by name, where it is not by itself: their status's fields.
      version: What the installation says its version is.
      multi_user: Whether it has several users.
      without_mlmd: Whether it is as after 2.17 (pull request 13986): no details of tasks, and tasks
        only where they are asked for.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, list[dict[str, Any]]] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.recurring: list[dict[str, Any]] = []
        self.states: list[tuple[str, dict[str, str]]] = [("SUCCEEDED", {})]
        self.token: str | None = None
        self.status: int | None = None
        self.silent = 0
        self.pods: dict[str, tuple[dict[str, str], dict[str, str], str, str]] = {}
        self.ended: dict[str, dict[str, Any]] = {}
        self.version = "2.17.0"
        self.multi_user = False
        self.without_mlmd = False
        self.messages: dict[str, str] = {}
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                cluster._answer(self, "GET")

            def do_POST(self) -> None:
                cluster._answer(self, "POST")

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Cluster:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sent(self, method: str, path: str) -> list[Any]:
        """Bodies of the requests of this kind."""
        return [request[3] for request in self.requests if request[:2] == (method, path)]

    def _answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        body: Any = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get_content_type() == "multipart/form-data":
            head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
            message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
            body = {
                part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                for part in message.iter_parts()
            }
        elif body:
            body = json.loads(body)
        split = urllib.parse.urlsplit(request.path)
        query = dict(urllib.parse.parse_qsl(split.query))
        self.requests.append((method, split.path, query, body))
        if self.silent:
            self.silent -= 1
            request.close_connection = True
            return
        if self.status:
            status, answer = self.status, {"error": "told to", "code": 0}
        elif self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            status, answer = 401, {"error": "there is no user identity header"}
        else:
            status, answer = self._route(method, split.path, query, body)
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        request.send_response(status)
        kind = "text/plain" if isinstance(answer, str) else "application/json"
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _route(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        parts = path.removeprefix(BASE).strip("/").split("/")
        match method, parts:
            case "GET", ["healthz"]:
                return 200, {
                    "commit_sha": "0",
                    "tag_name": self.version,
                    "multi_user": self.multi_user,
                }
            case "GET", ["pipelines"]:
                return 200, _page("pipelines", self._matching(query, self.pipelines), query)
            case "POST", ["pipelines", "upload"]:
                made = {
                    "pipeline_id": f"p{len(self.pipelines)}",
                    "display_name": query["name"],
                    "namespace": self._namespace(query),
                }
                if any(_same(made, known) for known in self.pipelines.values()):
                    return 409, {"error": "The name and namespace already exist."}
                self.pipelines[made["pipeline_id"]] = made
                # The backend makes a version of what is uploaded, under the pipeline's name.
                self._add_version(made["pipeline_id"], query["name"], body)
                return 200, made
            case "POST", ["pipelines", "upload_version"]:
                return 200, self._add_version(query["pipelineid"], query["name"], body)
            case "GET", ["pipelines", pipeline, "versions"]:
                return 200, _page("pipeline_versions", self.versions[pipeline], query)
            case "GET" | "POST", ["experiments"] if self.multi_user and not (body or query).get(
                "namespace"
            ):
                return 400, {"error": "Invalid input error: the namespace is empty"}
            case "GET", ["experiments"]:
                found = self._matching(query, self.experiments)
                return 200, _page("experiments", found, query)
            case "POST", ["experiments"]:
                made = {
                    **body,
                    "experiment_id": f"e{len(self.experiments)}",
                    "namespace": self._namespace(body),
                }
                if any(_same(made, known) for known in self.experiments.values()):
                    return 409, {"error": "Experiment already exists."}
                self.experiments[made["experiment_id"]] = made
                return 200, made
            case "POST", ["runs"]:
                made = {**body, "run_id": f"r{len(self.runs)}", "state": "PENDING"}
                self.runs[made["run_id"]] = made
                return 200, made
            case "GET", ["runs", run] if run in self.runs:
                return 200, self._progress(run, query)
            case "POST", ["recurringruns"]:
                made = {**body, "recurring_run_id": f"j{len(self.recurring)}"}
                self.recurring.append(made)
                return 200, made
            case "GET", ["api", "v1", "namespaces", "kubeflow", "pods"]:
                key, _, value = query["labelSelector"].partition("=")
                items = [
                    {
                        "metadata": {"name": name, "labels": labels, "annotations": annotations},
                        "status": {"phase": phase, **self.ended.get(name, {})},
                        "spec": {"containers": []},
                    }
                    for name, (labels, annotations, phase, _) in self.pods.items()
                    if labels.get(key) == value
                ]
                return 200, {"kind": "PodList", "apiVersion": "v1", "items": items}
            case "GET", ["api", "v1", "namespaces", "kubeflow", "pods", name, "log"]:
                lines = self.pods[name][3].splitlines(keepends=True)
                return 200, "".join(lines[-int(query["tailLines"]) :])
        return 404, {"error": f"{method} {path}: not found"}

    def _add_version(self, pipeline: str, name: str, body: dict[str, bytes]) -> dict[str, Any]:
        versions = self.versions.setdefault(pipeline, [])
        made = {
            "pipeline_id": pipeline,
            "pipeline_version_id": f"{pipeline}v{len(versions)}",
            "display_name": name,
        }
        assert body["uploadfile"]
        versions.append(made)
        return made

    def _progress(self, run: str, query: dict[str, str]) -> dict[str, Any]:
        state, states = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        error = {"error": {"code": 9, "message": "it broke"}} if state == "FAILED" else {}
        progress = {**self.runs[run], "state": state, **error}
        times = {"start_time": "2026-01-31T12:00:00Z", "end_time": "2026-01-31T12:01:05.123456789Z"}
        tasks = [
            {"run_id": run, "task_id": name, "display_name": name, "state": task_state, **times}
            for name, task_state in states.items()
        ]
        if not self.without_mlmd:
            return {**progress, "run_details": {"task_details": tasks}}
        for task in tasks:
            task["name"], task["create_time"] = task.pop("display_name"), task.pop("start_time")
            task["status_metadata"] = {"message": self.messages.get(str(task["name"]), "")}
        full = {"tasks": tasks} if query.get("view") == "FULL" else {}
        return {**progress, "task_count": len(tasks), **full}

    def _namespace(self, given: dict[str, Any]) -> str:
        return given.get("namespace") or "" if self.multi_user else ""

    def _matching(
        self, query: dict[str, str], items: dict[str, dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """What a listing leaves: those of the namespace, with the filter's name."""
        predicates = json.loads(query.get("filter") or "{}").get("predicates", [])
        wanted = [each.get("stringValue", each.get("string_value")) for each in predicates]
        return [
            item
            for item in items.values()
            if item["namespace"] == self._namespace(query)
            and all(item["display_name"] == value for value in wanted)
        ]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two would have one name in one namespace."""
    return all(one[key] == other[key] for key in ("display_name", "namespace"))


def _page(name: str, items: list[Any], query: dict[str, str]) -> dict[str, Any]:
    """A page of two items; the token says where the next one begins."""
    start = int(query.get("page_token") or 0)
    answer: dict[str, Any] = {name: items[start : start + 2]} if items else {}
    if start + 2 < len(items):
        answer["next_page_token"] = str(start + 2)
    return answer
