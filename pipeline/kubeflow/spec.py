"""Makes of what TFX compiles a pipeline that open-source Kubeflow Pipelines can run as it is.

Plain functions on the specification as dictionaries (JSON names of the protos `PipelineSpec` and
`KubernetesExecutorConfig`); nothing of TFX or kfp is imported, so both lines write the same bytes.
Fields are those that every backend since 2.0 reads, where newer ones have a second name for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from pipeline.config import ConfigError
from pipeline.kubeflow.config import KubeflowConfig, Resources

Spec = dict[str, Any]

# These train: on GPUs, with an image and a shared memory for that.
TRAINING = ("Tuner", "Trainer")
# Importing TensorFlow and TFX takes 1.5 GB.
_SMALL = Resources(1, 3)
_RESOURCES = {
    "ExampleGen": Resources(2, 4),
    "StatisticsGen": Resources(2, 6),
    "Transform": Resources(2, 6),
    **dict.fromkeys(TRAINING, Resources(4, 16)),
    "Evaluator": Resources(2, 8),
    "ServingValidator": Resources(2, 6),
    "Converter": Resources(2, 6),
}
# These read or write what is no artifact and so in no cache key: the folder of pushed models.
_UNCACHED = ("BaseModel", "Baseline", "Pusher")
# Argo takes this for the deadline of all tries together, ends the one that runs then, and makes no
# second one where it is 0, which KFP has by default: longer than any training.
_RETRIES_END = "2592000s"
# And these anything else that is no artifact. A volume may be mountable on one node at a time.
_ON_VOLUME = ("DataFingerprint", "ExampleGen", *TRAINING, *_UNCACHED)


def adapt(spec: Spec, config: KubeflowConfig) -> None:
    """Removes what only Vertex could run, and says what each component may cache and use.

    Args:
      spec: The pipeline's specification, with all its parameters; changed in place.
      config: Where it is to run.

    Raises:
      ConfigError: The configuration names a component that the graph does not have.
    """
    tasks = spec["root"]["dag"]["tasks"]
    named = {
        "resources": config.component_resources,
        "node_selector": [selector.component for selector in config.selectors],
        "tolerations": [toleration.component for toleration in config.taints],
    }
    for flag, components in named.items():
        for component in components:
            if component and component not in tasks:
                raise ConfigError(
                    f"--{flag} names {component!r}: there are {', '.join(sorted(tasks))}."
                )
    uncached = _downstream(tasks, _UNCACHED)
    # As kfp names them: its local runner cuts the prefix off.
    spec["components"] = {f"comp-{name}": value for name, value in spec["components"].items()}
    for task in tasks.values():
        task["componentRef"]["name"] = f"comp-{task['componentRef']['name']}"
    for name, task in tasks.items():
        component = spec["components"][task["componentRef"]["name"]]
        container = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        task["cachingOptions"] = {"enableCache": config.cache and name not in uncached}
        definitions = component.get("inputDefinitions", {})
        arguments = container["args"]
        arguments[arguments.index("--json_serialized_inputs_spec_args") + 1] = json.dumps(
            definitions, sort_keys=True
        )
        container["resources"] = _resources(name, config)
        if name in TRAINING and config.trainer_image:
            container["image"] = config.trainer_image
        if name in TRAINING and config.retries:
            # They go on from their last checkpoint.
            task["retryPolicy"] = {
                "maxRetryCount": config.retries,
                "backoffDuration": "60s",
                "backoffFactor": 2.0,
                "backoffMaxDuration": _RETRIES_END,
            }
    if config.pipeline_root:
        spec["defaultPipelineRoot"] = config.pipeline_root


def _downstream(tasks: Mapping[str, Spec], sources: Iterable[str]) -> set[str]:
    """The sources and all that takes in an artifact of theirs, however far away."""
    found = set(sources)
    while True:
        more = {
            name
            for name, task in tasks.items()
            for artifact in task.get("inputs", {}).get("artifacts", {}).values()
            if artifact["taskOutputArtifact"]["producerTask"] in found
        }
        if more <= found:
            return found
        found |= more


def _resources(component: str, config: KubeflowConfig) -> Spec:
    resources = config.component_resources.get(component, _RESOURCES.get(component, _SMALL))
    result: Spec = {"cpuLimit": resources.cpu, "memoryLimit": resources.memory}
    if component in TRAINING and config.gpus:
        # The type becomes the name of the pod's resource as it is.
        result["accelerator"] = {"type": config.gpu_resource, "count": str(config.gpus)}
    return result


def platform_spec(spec: Spec, config: KubeflowConfig) -> Spec:
    """What Kubernetes has to know of each container, for which TFX and pipelines have no fields.

    Args:
      spec: The pipeline's specification.
      config: Where it is to run.

    Returns:
      A `PlatformSpec`: the second document of a pipeline package.
    """
    executors = {
        spec["components"][task["componentRef"]["name"]]["executorLabel"]: _executor_config(
            name, config
        )
        for name, task in spec["root"]["dag"]["tasks"].items()
    }
    return {"platforms": {"kubernetes": {"deploymentSpec": {"executors": executors}}}}


def _executor_config(component: str, config: KubeflowConfig) -> Spec:
    result: Spec = {"imagePullPolicy": config.image_pull_policy}
    if config.pull_secrets:
        result["imagePullSecret"] = [{"secretName": name} for name in config.pull_secrets]
    if config.volume and component in _ON_VOLUME:
        result["pvcMount"] = [{"constant": config.volume, "mountPath": config.volume_path}]
    if secret := config.secret:
        result["secretAsEnv"] = [
            {
                "secretName": secret.name,
                "keyToEnv": [
                    {"secretKey": key, "envVar": variable}
                    for key, variable in secret.variables.items()
                ],
            }
        ]
    labels = {
        selector.label: selector.value
        for selector in config.selectors
        if selector.component in ("", component)
    }
    if labels:
        result["nodeSelector"] = {"labels": labels}
    tolerations = [
        {
            "key": taint.key,
            "operator": "Equal" if taint.value else "Exists",
            **({"value": taint.value} if taint.value else {}),
            "effect": taint.effect,
        }
        for taint in config.taints
        if taint.component in ("", component)
    ]
    if tolerations:
        result["tolerations"] = tolerations
    # The image's own may be read-only.
    result["emptyDirMounts"] = [{"volumeName": "temporary", "mountPath": "/tmp"}]
    if component in TRAINING:
        result["emptyDirMounts"].append(
            {
                "volumeName": "shared-memory",
                "mountPath": "/dev/shm",
                "medium": "Memory",
                "sizeLimit": config.shared_memory,
            }
        )
    return result


def package(spec: Spec, platform: Spec) -> str:
    """Writes both as a pipeline package.

    Args:
      spec: A `PipelineSpec`.
      platform: A `PlatformSpec`.

    Returns:
      YAML of two documents, the same for the same input, byte for byte.
    """
    return yaml.safe_dump_all([spec, platform], sort_keys=True, width=100)
