"""The knobs of a compiled pipeline: those of `PipelineConfig`, and what Kubernetes has to know.

Like `pipeline.config`, cheap to import and checked before anything else happens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.command_line import parse
from pipeline.config import PipelineConfig, knob

# A folder on this machine has no meaning in a cluster, and a log there is read after the fact.
_WITHOUT = ("work_dir", "verbosity")
_PIPELINE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")
_OBJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
# Kubeflow Pipelines' driver names the pod's volume after the claim; a volume's name is a DNS label.
_CLAIM_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9./_-]+")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([EPTGMk]i?|m)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
# From the secret that installations of Kubeflow Pipelines have to what clients of S3 read.
_SECRET_KEYS = "accesskey=AWS_ACCESS_KEY_ID,secretkey=AWS_SECRET_ACCESS_KEY"


class Resources(NamedTuple):
    """What a container may use: cores, and GB (of 10^9 bytes) of memory."""

    cpu: float
    memory: float


class Toleration(NamedTuple):
    """A taint in spite of which a component (empty: any) may be scheduled; an empty value: any."""

    component: str
    key: str
    value: str
    effect: str


class Selector(NamedTuple):
    """A label that the nodes of a component (empty: any) must have."""

    component: str
    label: str
    value: str


class Secret(NamedTuple):
    """A Kubernetes secret, with the environment variable that each of its keys becomes."""

    name: str
    variables: dict[str, str]


@dataclasses.dataclass(frozen=True)
class KubeflowConfig(PipelineConfig):
    """What is compiled; each field's meaning is its flag's help.

    Raises:
      ConfigError: A value is out of range.
    """

    data: str = knob(
        "/data/cifar-100",
        "data",
        "folder of images, manifest, Parquet files, or CIFAR's binary layout: a path on the "
        "volume, or a URI; with --vertex, gs:// or /gcs/",
        metavar="DIR",
    )
    dataset_name: str = knob(
        "cifar-100", "data", "name of the data, for the model and its card", metavar="NAME"
    )
    data_fingerprint: str | None = knob(
        None,
        "data",
        "identifies the data's contents, for the cache; default: that of --fingerprint_of, or else "
        "every run has to give it",
        metavar="SHA256",
    )
    fingerprint_of: str | None = knob(
        None,
        "data",
        "a copy of the data on this machine (folder or archive), to take the fingerprint of",
        metavar="PATH",
    )
    fingerprint_in_run: bool = knob(
        False,
        "data",
        "take the fingerprint in each run, in a task of its own, so that the runs of a schedule "
        "see new data",
    )
    serving_dir: str = knob(
        "/data/serving_models",
        "places",
        "folder to push models into, as <model name>/<version>: as --data",
        metavar="DIR",
    )
    checkpoints: str | None = knob(
        None,
        "places",
        "folder from which interrupted trainings continue: a path on the volume; with --vertex, "
        "/gcs/ or /tmp/; default: /data/checkpoints, /tmp/checkpoints with --vertex",
        metavar="DIR",
    )
    root: str = knob(
        "",
        "places",
        "pipeline root, minio://, s3:// or gs://; default: the installation's",
        metavar="URI",
    )
    output: str | None = knob(
        None,
        "places",
        "file to write; default: pipeline.yaml, pipeline.json with --vertex",
        metavar="FILE",
    )
    vertex: bool = knob(False, "running", "write a job for Vertex AI; needs --root gs://")
    image: str = knob(
        "vit-pipeline:latest", "cluster", "image with this project in it", metavar="REFERENCE"
    )
    trainer_image: str | None = knob(
        None,
        "cluster",
        "another image for Trainer and Tuner, such as one with the CUDA libraries",
        metavar="REFERENCE",
    )
    image_pull_policy: str = knob(
        "IfNotPresent",
        "cluster",
        "when nodes pull it",
        choices=("Always", "IfNotPresent", "Never"),
    )
    image_pull_secrets: str = knob(
        "", "cluster", "secrets for its registry", metavar="NAME[,NAME...]"
    )
    resources: str = knob(
        "",
        "cluster",
        "cores and GB of memory of components, such as Trainer=8:32,Evaluator=4:16",
        metavar="COMPONENT=CPU:GB[,...]",
    )
    retries: int = knob(
        2,
        "cluster",
        "how often Trainer and Tuner are started again when they fail or their node goes away; "
        "they go on from the last checkpoint (Kubeflow Pipelines 2.4.1 or newer)",
        metavar="N",
    )
    gpus: int = knob(
        0, "cluster", "GPUs for Trainer and Tuner; the other components use none", metavar="N"
    )
    gpu_resource: str = knob(
        "nvidia.com/gpu",
        "cluster",
        "Kubernetes's name for a GPU, or Vertex's accelerator type",
        metavar="NAME",
    )
    node_selector: str = knob(
        "",
        "cluster",
        "labels of the nodes to use, for a component or for all",
        metavar="[COMPONENT:]LABEL=VALUE[,...]",
    )
    tolerations: str = knob(
        "",
        "cluster",
        "taints to tolerate, for a component or for all; with --gpus, Trainer and Tuner tolerate "
        "GPU_RESOURCE:NoSchedule besides",
        metavar="[COMPONENT:]KEY[=VALUE]:EFFECT[,...]",
    )
    shared_memory: str = knob(
        "2Gi",
        "cluster",
        "size of Trainer's and Tuner's /dev/shm, part of their memory",
        metavar="SIZE",
    )
    volume: str = knob(
        "vit-data",
        "cluster",
        "persistent volume claim with data, checkpoints and models; empty for none",
        metavar="NAME",
    )
    volume_path: str = knob("/data", "cluster", "where it is mounted", metavar="DIR")
    object_store_secret: str = knob(
        "",
        "cluster",
        "secret with credentials for launchers that take them from the environment; default keys: "
        + _SECRET_KEYS,
        metavar="NAME[:KEY=VARIABLE,...]",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            "pipeline_name",
            bool(_PIPELINE_NAME.fullmatch(self.pipeline_name)),
            "Kubeflow wants lower-case letters, digits and -",
        )
        self._check_location("data", self.data, "gs://")
        self._check_location("serving_dir", self.serving_dir, "gs://")
        self._check_location("checkpoints", self.checkpoint_dir)
        self._check(
            "fingerprint_in_run",
            not (self.fingerprint_in_run and (self.data_fingerprint or self.fingerprint_of)),
            "no other flag may give the fingerprint then",
        )
        schemes = ("gs://",) if self.vertex else ("minio://", "s3://", "gs://")
        needed = self.vertex or bool(self.root)
        bucket = self.root.partition("://")[2]
        self._check(
            "root",
            not needed or (self.root.startswith(schemes) and bool(bucket.strip("/"))),
            f"it must be a URI with a bucket: {' or '.join(schemes)}",
        )
        for name in ("image", "trainer_image"):
            value = getattr(self, name)
            self._check(name, value is None or bool(re.fullmatch(r"\S+", value)), "name an image")
        self._check("retries", 0 <= self.retries <= 100, "it must be 0 to 100")
        self._check("gpus", self.gpus >= 0, "it must be 0 or more")
        self._check(
            "gpu_resource",
            not (self.vertex and self.gpus) or bool(re.fullmatch(r"[A-Z0-9_]+", self.gpu_resource)),
            "name one of Vertex AI's accelerator types, such as NVIDIA_L4",
        )
        self._check(
            "shared_memory",
            bool(_QUANTITY.fullmatch(self.shared_memory)),
            "write a Kubernetes quantity such as 2Gi",
        )
        self._check(
            "volume",
            not self.volume or bool(_CLAIM_NAME.fullmatch(self.volume)),
            "name a claim of at most 63 lower-case letters, digits and -, which names the pods' "
            "volume, too",
        )
        self._check("volume_path", self.volume_path.startswith("/"), "write an absolute path")
        # Parsed for what is wrong with them.
        _ = self.pull_secrets, self.component_resources, self.selectors, self.taints, self.secret

    def _check_location(self, name: str, value: str, *schemes: str) -> None:
        if self.vertex:
            # It mounts the buckets there (cloud.google.com/vertex-ai/docs/training, Cloud Storage
            # as a mounted file system).
            places = (*schemes, "/gcs/") if schemes else ("/gcs/", "/tmp/")
            reached, hint = " and ".join(places), "Vertex AI has no volumes"
        else:
            places = ("/", *schemes)
            reached = " and ".join(
                ["absolute paths on the volume", *(f"{s} URIs" for s in schemes)]
            )
            hint = "Of minio:// and s3://, Kubeflow Pipelines brings artifacts and nothing else"
        self._check(
            name,
            value.startswith(places) and not re.search(r"[\"'\\{}\s]", value),
            f"containers reach {reached}, without quotes, braces, backslashes and spaces. {hint}",
        )

    def _items(self, name: str) -> Iterator[str]:
        return filter(None, (item.strip() for item in getattr(self, name).split(",")))

    def _match(self, name: str, pattern: str, item: str) -> re.Match[str]:
        match = re.fullmatch(pattern, item)
        self._check(name, match is not None, f"{item!r} is not as --help shows it")
        assert match is not None
        return match

    @property
    def pipeline_root(self) -> str:
        """Where the artifacts go, unless the run says otherwise."""
        return self.root.rstrip("/")

    @property
    def output_file(self) -> str:
        """The file to write."""
        return self.output or ("pipeline.json" if self.vertex else "pipeline.yaml")

    @property
    def checkpoint_dir(self) -> str:
        """Folder of the checkpoints of interrupted trainings."""
        return self.checkpoints or ("/tmp/checkpoints" if self.vertex else "/data/checkpoints")

    @property
    def pull_secrets(self) -> list[str]:
        """Names of the secrets for the image's registry."""
        return [
            self._match("image_pull_secrets", _OBJECT_NAME.pattern, item)[0]
            for item in self._items("image_pull_secrets")
        ]

    @property
    def component_resources(self) -> dict[str, Resources]:
        """What `resources` asks for, by component."""
        number = r"([0-9]+(?:\.[0-9]+)?)"
        matches = [
            self._match("resources", rf"([A-Z]\w*)={number}:{number}", item)
            for item in self._items("resources")
        ]
        return {match[1]: Resources(float(match[2]), float(match[3])) for match in matches}

    @property
    def selectors(self) -> list[Selector]:
        """The nodes' labels."""
        label = _LABEL.pattern
        matches = [
            self._match("node_selector", rf"(?:([A-Z]\w*):)?({label})=({label})", item)
            for item in self._items("node_selector")
        ]
        return [Selector(match[1] or "", match[2], match[3]) for match in matches]

    @property
    def taints(self) -> list[Toleration]:
        """The tolerated taints, that of nodes with GPUs among them."""
        label = _LABEL.pattern
        pattern = rf"(?:([A-Z]\w*):)?({label})(?:=({label}))?:({'|'.join(_EFFECTS)})"
        matches = [self._match("tolerations", pattern, item) for item in self._items("tolerations")]
        found = [
            Toleration(match[1] or "", match[2], match[3] or "", match[4]) for match in matches
        ]
        if self.gpus:
            training = ("Trainer", "Tuner") if self.tune else ("Trainer",)
            found += [Toleration(name, self.gpu_resource, "", "NoSchedule") for name in training]
        return found

    @property
    def secret(self) -> Secret | None:
        """The object store's credentials."""
        if not self.object_store_secret:
            return None
        name, _, keys = self.object_store_secret.partition(":")
        self._match("object_store_secret", _OBJECT_NAME.pattern, name)
        pattern = rf"([A-Za-z0-9._-]+)=({_VARIABLE.pattern})"
        matches = [
            self._match("object_store_secret", pattern, item)
            for item in (keys or _SECRET_KEYS).split(",")
        ]
        return Secret(name, {match[1]: match[2] for match in matches})


def parse_args(arguments: Sequence[str]) -> KubeflowConfig:
    """Reads the command line of kubeflow/runner.py; see `pipeline.command_line.parse`."""
    return parse(
        KubeflowConfig,
        arguments,
        without=_WITHOUT,
        prog="python kubeflow/runner.py",
        description="Compiles the pipeline for Kubeflow Pipelines 2, or for Vertex AI. What to "
        "train and where data and models are become parameters of the pipeline, with the values "
        "given here as defaults; the rest is compiled in.",
        epilog="examples:\n"
        "  --image registry/vit-pipeline:1.0 --fingerprint_of cifar-100-binary.tar.gz\n"
        "  --preset tiny --gpus 1 --resources Trainer=8:32 --node_selector Trainer:gpu=l4\n"
        "  --vertex --root gs://bucket/vit --data gs://bucket/cifar-100 "
        "--serving_dir gs://bucket/models --gpu_resource NVIDIA_L4 --gpus 1\n",
    )
