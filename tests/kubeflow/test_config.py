import subprocess
import sys

import pytest

from pipeline.config import ConfigError
from pipeline.kubeflow.config import KubeflowConfig, Resources, Selector, parse_args
from tests.kubeflow.conftest import REPOSITORY

VERTEX = "--vertex --root gs://b/vit --data gs://b/cifar-100 --serving_dir /gcs/b/models"


def test_defaults_are_a_path_on_the_volume_each():
    config = KubeflowConfig()
    assert config.data.startswith(config.volume_path)
    assert config.model_dir("cifar-100") == "/data/serving_models/cifar100_vit"
    assert config.checkpoint_dir == "/data/checkpoints"
    assert config.pipeline_root == ""
    assert config.taints == [] and config.secret is None


def test_vertex_has_buckets_in_place_of_a_volume():
    config = parse_args([*VERTEX.split(), "--gpus", "1", "--gpu_resource", "NVIDIA_L4"])
    assert config.model_dir("cifar-100") == "/gcs/b/models/cifar100_vit"
    assert config.checkpoint_dir == "/tmp/checkpoints"
    given = parse_args([*VERTEX.split(), "--checkpoints", "/gcs/b/checkpoints"])
    assert given.checkpoint_dir == "/gcs/b/checkpoints"


def test_lists():
    config = parse_args(
        [
            *("--resources", "Trainer=8:32.5,Pusher=0.5:2", "--gpus", "1"),
            *("--node_selector", "kubernetes.io/os=linux,Trainer:gpu=l4"),
            *("--tolerations", "spot:NoExecute,Trainer:example.org/gpu=l4:NoSchedule"),
            *("--object_store_secret", "keys:id=AWS_ACCESS_KEY_ID"),
            *("--image_pull_secrets", "a,b"),
        ]
    )
    assert config.component_resources == {
        "Trainer": Resources(8, 32.5),
        "Pusher": Resources(0.5, 2),
    }
    assert config.selectors == [
        Selector("", "kubernetes.io/os", "linux"),
        Selector("Trainer", "gpu", "l4"),
    ]
    assert [tuple(taint) for taint in config.taints] == [
        ("", "spot", "", "NoExecute"),
        ("Trainer", "example.org/gpu", "l4", "NoSchedule"),
        ("Trainer", "nvidia.com/gpu", "", "NoSchedule"),
    ]
    assert config.secret == ("keys", {"id": "AWS_ACCESS_KEY_ID"})
    assert config.pull_secrets == ["a", "b"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--data s3://bucket/data",
            "--data is 's3://bucket/data': containers reach absolute paths on the volume and gs:// "
            "URIs, without quotes, braces, backslashes and spaces. Of minio:// and s3://",
        ),
        ("--data cifar-100", "--data is 'cifar-100': containers reach absolute paths"),
        ("--serving_dir minio://b/m", "--serving_dir is 'minio://b/m'"),
        ('--serving_dir /data/a"b', "without quotes"),
        ("--checkpoints gs://bucket/c", "--checkpoints is 'gs://bucket/c'"),
        ("--root /data", "--root is '/data': it must be a URI with a bucket: minio:// or s3://"),
        ("--root minio://", "--root is 'minio://': it must be a URI with a bucket"),
        (f"{VERTEX} --root=", "--root is '': it must be a URI with a bucket: gs://"),
        (f"{VERTEX} --root s3://b/r", "--root is 's3://b/r'"),
        ("--pipeline_name Vit", "--pipeline_name is 'Vit': Kubeflow wants lower-case letters"),
        ("--gpus -1", "--gpus is -1"),
        ("--shared_memory 2GiB", "--shared_memory is '2GiB': write a Kubernetes quantity"),
        ("--resources Trainer=8", "'Trainer=8' is not as --help shows it"),
        ("--node_selector gpu", "'gpu' is not as --help shows it"),
        ("--tolerations gpu:Never", "'gpu:Never' is not as --help shows it"),
        ("--object_store_secret Keys", "'Keys' is not as --help shows it"),
        ("--object_store_secret keys:id=1A", "'id=1A' is not as --help shows it"),
        ("--volume Data", "--volume is 'Data'"),
        ("--volume team.data", "--volume is 'team.data': name a claim of at most 63"),
        (f"--volume {'a' * 64}", "--volume is 'aaa"),
        ("--preset tinny", "Unknown preset 'tinny': choose one of compact, "),
        ("--fingerprint_in_run --data_fingerprint 0", "no other flag may give the fingerprint"),
        (f"{VERTEX} --data /data/cifar-100", "containers reach gs:// and /gcs/, without"),
        (f"{VERTEX} --serving_dir /data/m", "--serving_dir is '/data/m'"),
        (f"{VERTEX} --checkpoints gs://b/c", "containers reach /gcs/ and /tmp/, without"),
        (f"{VERTEX} --checkpoints /data/c", "--checkpoints is '/data/c'"),
        (f"{VERTEX} --gpus 1", "--gpu_resource is 'nvidia.com/gpu': name one of Vertex AI's"),
        ("--work_dir /x", "there is no flag --work_dir"),
    ],
)
def test_what_no_cluster_could_do_is_refused(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        parse_args(flags.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bad_value_raises_the_configurations_error():
    with pytest.raises(ConfigError, match="--volume_path is 'data': write an absolute path"):
        KubeflowConfig(volume_path="data")


def test_help_is_at_hand():
    program = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_path('kubeflow/runner.py', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, *sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    code, *modules = process.stdout.splitlines()[-1].split()
    assert code == "0", process.stderr
    assert "--fingerprint_of PATH" in process.stdout
    assert {"tensorflow", "tfx", "kfp"}.isdisjoint(modules)
