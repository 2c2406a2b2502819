"""A task of the compiled pipeline that takes the fingerprint of the data in the run.

Without it, each run of a schedule gets the fingerprint that was compiled in, or given to the
schedule, and so the results of the first run from the cache, whatever the data are by then. Nor can
Kubeflow Pipelines put another value in: it expands [[ScheduledTime]] and the like in no run of a
schedule that names its pipeline's version (2.17, SubmitNewWorkflowIfNotAlreadySubmitted and
OverrideParameters: only Argo's own arguments, of which compiled pipelines have none).
"""

from __future__ import annotations

from typing import Any

from pipeline.kubeflow.config import KubeflowConfig

TASK = "DataFingerprint"
# The pipeline's parameter that the task takes the place of, and the ExampleGen's property.
PARAMETER, PROPERTY = "data_fingerprint", "content_fingerprint"
_COMMAND = ["python", "-u", "/app/kubeflow/data_fingerprint.py"]
_STRING = {"parameterType": "STRING"}


def add(spec: dict[str, Any], config: KubeflowConfig) -> None:
    """Adds the task, and lets ExampleGen take its output for the fingerprint.

    Args:
      spec: The pipeline's specification, adapted by `pipeline.kubeflow.spec`; changed in place.
      config: Where it is to run.
    """
    spec["components"][f"comp-{TASK}"] = {
        "executorLabel": f"{TASK}_executor",
        "inputDefinitions": {"parameters": {"data": _STRING, "options": _STRING}},
        "outputDefinitions": {"parameters": {"fingerprint": _STRING}},
    }
    spec["deploymentSpec"]["executors"][f"{TASK}_executor"] = {
        "container": {
            "image": config.image,
            "command": _COMMAND,
            "args": [
                "{{$.inputs.parameters['data']}}",
                "{{$.inputs.parameters['options']}}",
                "{{$.outputs.parameters['fingerprint'].output_file}}",
            ],
            "resources": {"cpuLimit": 2.0, "memoryLimit": 4.0},
        }
    }
    tasks = spec["root"]["dag"]["tasks"]
    inputs = tasks["ExampleGen"]["inputs"]["parameters"]
    tasks[TASK] = {
        "taskInfo": {"name": TASK},
        "componentRef": {"name": f"comp-{TASK}"},
        "inputs": {
            "parameters": {
                "data": {"componentInputParameter": "data"},
                "options": dict(inputs["options"]),
            }
        },
        # It is what notices that the data have changed.
        "cachingOptions": {"enableCache": False},
    }
    inputs[PROPERTY] = {
        "taskOutputParameter": {"producerTask": TASK, "outputParameterKey": "fingerprint"}
    }
    tasks["ExampleGen"]["dependentTasks"] = [TASK]
