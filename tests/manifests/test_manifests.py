"""Every manifest: rendered by kubectl, held to the schemas of Kubernetes, and to each other."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from serving.server import config

ROOT = Path(__file__).resolve().parents[2]
SERVING = ROOT / "serving" / "deploy"
KUBEFLOW = ROOT / "kubeflow" / "manifests"
# The oldest and the newest Kubernetes that the manifests are for.
VERSIONS = ("1.29", "1.37")
OVERLAYS = {
    "serving-cpu": SERVING / "kubernetes/overlays/cpu",
    "serving-gpu": SERVING / "kubernetes/overlays/gpu",
    "serving-storage": SERVING / "kubernetes/storage",
    "kserve": SERVING / "kserve",
    "kubeflow-single": KUBEFLOW / "overlays/single-user",
    "kubeflow-multi": KUBEFLOW / "overlays/multi-user",
    "kubeflow-profile": KUBEFLOW / "profile",
}
SINGLE = [
    KUBEFLOW / name
    for name in ("gpu-quota.yaml", "kfp-launcher.yaml", "loader.yaml", "object-store-secret.yaml")
]
# What is not Kubernetes's own, and has tests of its own here.
CUSTOM = ("InferenceService", "Profile")
CONFIG = ROOT / "serving" / "config"
# Of KServe's v1beta1 API, what is not Kubernetes's own: PredictorSpec is a PodSpec and
# ComponentExtensionSpec, ModelSpec a Container and PredictorExtensionSpec.
KSERVE_PREDICTOR = {
    "type": "object",
    "required": ["model"],
    "additionalProperties": False,
    "properties": {
        "minReplicas": {"type": "integer", "minimum": 0},
        "maxReplicas": {"type": "integer", "minimum": 1},
        "scaleMetric": {"enum": ["cpu", "memory", "concurrency", "rps"]},
        "scaleTarget": {"type": "integer", "minimum": 1},
        "model": {
            "type": "object",
            "required": ["modelFormat"],
            "additionalProperties": False,
            "properties": {
                "modelFormat": {
                    "type": "object",
                    "required": ["name"],
                    "additionalProperties": False,
                    "properties": {"name": {"type": "string"}, "version": {"type": "string"}},
                },
                "protocolVersion": {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]},
                "runtimeVersion": {"type": "string"},
                "storageUri": {"type": "string", "pattern": "^(pvc|gs|s3)://."},
            },
        },
    },
}


def render(folder: Path) -> list[dict[str, Any]]:
    """The manifests of a kustomization, as `kubectl apply -k` would send them."""
    kubectl = Path(sys.executable).parent / "kubectl"
    result = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[dict[str, Any]]]:
    return {name: render(folder) for name, folder in OVERLAYS.items()}


def one(manifests: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    (found,) = [
        manifest
        for manifest in manifests
        if manifest["kind"] == kind and name in (None, manifest["metadata"]["name"])
    ]
    return found


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    return deployment["spec"]["template"]["spec"]["containers"][0]


def flags(arguments: list[str]) -> dict[str, str]:
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


def test_every_kustomization_is_rendered_here() -> None:
    folders = {path.parent for path in ROOT.glob("*/**/kustomization.yaml")}
    bases = {SERVING / "kubernetes/base", KUBEFLOW / "base", CONFIG}
    assert folders == bases | set(OVERLAYS.values())


def test_every_manifest_is_rendered_or_checked_alone() -> None:
    listed = set(SINGLE) | {SERVING / "compose.yaml", SERVING / "kserve/names.yaml"}
    for kustomization in ROOT.glob("*/**/kustomization.yaml"):
        listed.add(kustomization)
        content = yaml.safe_load(kustomization.read_text())
        names = [*content.get("resources", [])]
        names += [patch["path"] for patch in content.get("patches", []) if "path" in patch]
        listed |= {kustomization.parent / name for name in names}
    found = {path for top in (SERVING, KUBEFLOW) for path in top.rglob("*.yaml")}
    assert found - listed == set()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rendered_manifests_follow_the_schemas(
    rendered: dict[str, list[dict[str, Any]]], overlay: str, version: str
) -> None:
    assert rendered[overlay]
    for manifest in (m for m in rendered[overlay] if m["kind"] not in CUSTOM):
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", SINGLE, ids=lambda path: path.stem)
def test_single_manifests_follow_the_schemas(path: Path, version: str) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_refuse_what_is_wrong(rendered: dict[str, list[dict[str, Any]]]) -> None:
    deployment = copy.deepcopy(one(rendered["serving-cpu"], "Deployment"))
    container(deployment)["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_inference_service_follows_kserves_and_kubernetes_schemas(
    rendered: dict[str, list[dict[str, Any]]], version: str
) -> None:
    service = copy.deepcopy(one(rendered["kserve"], "InferenceService"))
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    predictor = service["spec"].pop("predictor")
    assert service["spec"] == {}
    model = predictor.pop("model")
    of_kserve = KSERVE_PREDICTOR["properties"]["model"]["properties"]
    extension = {key: model.pop(key) for key in [*model] if key in of_kserve}
    keys = [key for key in predictor if key in KSERVE_PREDICTOR["properties"]]
    scaling = {key: predictor.pop(key) for key in keys}
    jsonschema.validate({**scaling, "model": extension}, KSERVE_PREDICTOR)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "predictor"},
        "spec": {**predictor, "containers": [{"name": "kserve-container", **model}]},
    }
    kubernetes_validate.validate(pod, version, strict=True)
    config_map = one(rendered["kserve"], "ConfigMap", predictor["volumes"][0]["configMap"]["name"])
    for flag in ("batching_parameters_file", "monitoring_config_file"):
        assert Path(flags(model["args"])[flag]).name in config_map["data"]


def test_kserves_pods_say_where_their_metrics_are(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    annotations = one(rendered["kserve"], "InferenceService")["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    path = config.read_prometheus_path(CONFIG / "monitoring.config")
    assert annotations["prometheus.io/path"] == path
    # REST's, in KServe's ClusterServingRuntime kserve-tensorflow-serving.
    assert annotations["prometheus.io/port"] == "8080"
    # "true" would have KServe put 9091 and /metrics in their place (metrics_aggregate_injector.go).
    assert annotations["serving.kserve.io/enable-prometheus-scraping"] == "false"
    assert annotations["serving.kserve.io/deploymentMode"] == "Standard"


@pytest.mark.parametrize("overlay", ["serving-cpu", "serving-gpu"])
def test_the_servers_probes_rights_and_names_agree(
    rendered: dict[str, list[dict[str, Any]]], overlay: str
) -> None:
    manifests = rendered[overlay]
    deployment = one(manifests, "Deployment")
    pod, server = deployment["spec"]["template"]["spec"], container(deployment)
    given = flags(server["args"])
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"grpc": int(given["port"]), "http": int(given["rest_api_port"])}
    # A gRPC probe is answered only with this flag.
    assert given["enable_grpc_healthcheck_service"] == "true"
    assert server["startupProbe"]["grpc"] == server["livenessProbe"]["grpc"] == {"port": 8500}
    (model,) = config.read_models(CONFIG / "models.config")
    readiness = server["readinessProbe"]["httpGet"]
    assert readiness == {"path": f"/v1/models/{model.name}/metadata", "port": "http"}
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    path = config.read_prometheus_path(CONFIG / "monitoring.config")
    assert annotations["prometheus.io/path"] == path
    assert annotations["prometheus.io/port"] == given["rest_api_port"]

    assert pod["securityContext"]["runAsNonRoot"]
    # As whoever has made the volume and what is in it, which another fsGroup could take away.
    loader = yaml.safe_load((KUBEFLOW / "loader.yaml").read_text())["spec"]["securityContext"]
    for name in ("runAsUser", "runAsGroup", "fsGroup"):
        assert pod["securityContext"][name] == loader[name]
    assert not pod["automountServiceAccountToken"]
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert {"cpu", "memory"} <= set(server["resources"]["requests"])
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert str(model.base_path).startswith(mounts["data"] + "/")
    configs = {v["name"]: v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v}
    for flag in ("model_config_file", "batching_parameters_file", "monitoring_config_file"):
        path = Path(given[flag])
        (volume,) = [name for name, folder in mounts.items() if folder == str(path.parent)]
        assert path.name in one(manifests, "ConfigMap", configs[volume])["data"]

    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [m["spec"]["selector"] for m in manifests if m["kind"] == "Service"]
    assert len(selectors) == 2
    selectors.append(one(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    assert all(selector.items() <= labels.items() for selector in selectors)
    target = one(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target["name"] == deployment["metadata"]["name"]
    claim = one(rendered["serving-storage"], "PersistentVolumeClaim")["metadata"]["name"]
    assert [
        v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if v["name"] == "data"
    ] == [claim]
    stop = server["lifecycle"]["preStop"]["exec"]["command"]
    assert int(stop[1]) < pod["terminationGracePeriodSeconds"]


def test_the_gpu_variant_asks_for_one_and_uses_its_batching(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    cpu, gpu = (one(rendered[f"serving-{kind}"], "Deployment") for kind in ("cpu", "gpu"))
    assert container(gpu)["image"] == container(cpu)["image"] + "-gpu"
    assert container(gpu)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in container(cpu)["resources"]["limits"]
    changed = flags(container(gpu)["args"]).items() - flags(container(cpu)["args"]).items()
    assert changed == {("batching_parameters_file", "/config/server/batching.gpu.config")}
    # A GPU that is in use has no room for a second server.
    assert gpu["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


def test_labels_move_without_a_restart_and_other_settings_with_one(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    names = [m["metadata"]["name"] for m in rendered["serving-cpu"] if m["kind"] == "ConfigMap"]
    assert "vit-serving-models" in names
    assert any(name.startswith("vit-serving-config-") for name in names)
    given = flags(container(one(rendered["serving-cpu"], "Deployment"))["args"])
    assert int(given["model_config_file_poll_wait_seconds"]) > 0
    assert given["allow_version_labels_for_unavailable_models"] == "true"


@pytest.mark.parametrize("service", ["serving", "serving-gpu"])
def test_compose_runs_the_same_server(
    rendered: dict[str, list[dict[str, Any]]], service: str
) -> None:
    compose = yaml.safe_load((SERVING / "compose.yaml").read_text())["services"][service]
    overlay = "serving-gpu" if service.endswith("gpu") else "serving-cpu"
    deployed = container(one(rendered[overlay], "Deployment"))
    assert compose["image"].replace("${TF_SERVING:-2.21.0}", "2.21.0") == deployed["image"]
    ours, theirs = flags(compose["command"]), flags(deployed["args"])
    for flag in ours:
        if flag.endswith("_file"):
            assert (CONFIG / Path(ours[flag]).name).is_file()
            assert Path(ours[flag]).name == Path(theirs[flag]).name
        elif not flag.endswith("_wait_seconds"):
            assert ours[flag] == theirs[flag], flag
    assert all(port.startswith("127.0.0.1:") for port in compose["ports"])
    defaults = [re.fullmatch(r"\$\{\w+:-(.*)\}:.*:ro", text) for text in compose["volumes"]]
    assert [os.path.realpath(SERVING / default[1]) for default in defaults if default] == [
        str(ROOT / "output" / "serving_models"),
        str(CONFIG),
    ]


def test_the_image_is_of_the_tensorflow_that_is_locked() -> None:
    text = (SERVING / "kubernetes/base/deployment.yaml").read_text()
    for line, tag in (("tfx-1.21-py313", "2.21.0"), ("tfx-1.16-py310", "2.16.1")):
        lock = (ROOT / "requirements" / f"{line}.txt").read_text()
        (locked,) = [row.split()[0] for row in lock.splitlines() if row.startswith("tensorflow==")]
        assert locked.startswith(f"tensorflow=={tag.rpartition('.')[0]}.")
        assert tag in text


@pytest.mark.parametrize("overlay", ["kubeflow-single", "kubeflow-multi"])
def test_a_runs_identity_has_least_rights(
    rendered: dict[str, list[dict[str, Any]]], overlay: str
) -> None:
    manifests = rendered[overlay]
    # No quota: in a shared namespace it would bind everybody's pods.
    assert {m["kind"] for m in manifests} == {
        "PersistentVolumeClaim",
        "Role",
        "RoleBinding",
        "ServiceAccount",
    }
    for name in ("vit-pipeline", "vit-deployer"):
        account = one(manifests, "ServiceAccount", name)["metadata"]
        binding = one(manifests, "RoleBinding", name)
        assert binding["roleRef"]["name"] == one(manifests, "Role", name)["metadata"]["name"]
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": name, "namespace": account["namespace"]}
        ]
    rules = {
        resource: rule
        for rule in one(manifests, "Role", "vit-pipeline")["rules"]
        for resource in rule["resources"]
    }
    secret = yaml.safe_load((KUBEFLOW / "object-store-secret.yaml").read_text())
    assert secret["metadata"]["name"] in rules["secrets"]["resourceNames"]
    assert {resource: rule["verbs"] for resource, rule in rules.items()} == {
        "configmaps": ["get"],
        "secrets": ["get"],
        "pods": ["get"],
        "workflowtaskresults": ["create", "patch"],
        # As pipeline-runner and view-edit-cluster-roles.yaml have them (pipelines PR 13986).
        "runs": ["get", "list", "update"],
        "artifacts": ["get", "list", "create"],
    }
    for role in (m for m in manifests if m["kind"] == "Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
            assert not {"delete", "deletecollection"} & set(rule["verbs"])


def test_the_profile_makes_the_namespace_of_several_users_runs(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    (profile,) = rendered["kubeflow-profile"]
    assert profile["apiVersion"] == "kubeflow.org/v1"
    # It is of the whole cluster; its name is the namespace's (profile_controller.go).
    assert set(profile["metadata"]) == {"name", "labels"}
    assert profile["spec"] == {"owner": {"kind": "User", "name": "user@example.com"}}
    account = one(rendered["kubeflow-multi"], "ServiceAccount", "vit-pipeline")
    assert account["metadata"]["namespace"] == profile["metadata"]["name"]


def test_the_launchers_template_fits_the_secrets_and_the_rights(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    template = yaml.safe_load((KUBEFLOW / "kfp-launcher.yaml").read_text())
    secret = yaml.safe_load((KUBEFLOW / "object-store-secret.yaml").read_text())
    role = one(rendered["kubeflow-single"], "Role", "vit-pipeline")
    names = [name for rule in role["rules"] for name in rule.get("resourceNames", [])]
    assert template["metadata"]["name"] in names
    store = yaml.safe_load(template["data"]["providers"])["s3"]
    # An override has to have all of it (s3.go), and without a default the whole is refused.
    for part in (store["default"], *store["overrides"]):
        reference = part["credentials"]["secretRef"]
        assert reference["secretName"] == secret["metadata"]["name"]
        keys = {reference["accessKeyKey"], reference["secretKeyKey"]}
        assert keys == set(secret["stringData"])
        assert part["endpoint"] and part["region"]
    assert all(part["bucketName"] for part in store["overrides"])


def test_the_secret_template_holds_no_secret() -> None:
    secret = yaml.safe_load((KUBEFLOW / "object-store-secret.yaml").read_text())
    assert secret["stringData"] == {"accesskey": "", "secretkey": ""}
