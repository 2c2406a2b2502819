"""TF Serving's configuration files as shipped, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from serving import config_files, ssl_config

CONFIG = Path(config_files.__file__).parent / "config"


def test_the_models_file_serves_what_the_pipeline_pushes() -> None:
    config = config_files.read(CONFIG / "models.config", config_files.ModelServerConfig)
    (model,) = config.model_config_list.config
    # PipelineConfig.resolve_model_name("cifar-100")
    assert (model.name, model.base_path) == ("cifar100_vit", "/models/cifar100_vit")
    assert model.model_platform == "tensorflow"
    assert model.model_version_policy.latest.num_versions == 2
    assert not model.version_labels


@pytest.mark.parametrize("name", ["batching.config", "batching.gpu.config"])
def test_the_batching_files_are_what_tf_serving_accepts(name: str) -> None:
    batching = config_files.read_batching(CONFIG / name)
    sizes = list(batching.allowed_batch_sizes)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1
    assert sizes[-1] == batching.max_batch_size.value >= 32
    assert batching.num_batch_threads.value >= 1
    assert 1 <= batching.max_enqueued_batches.value <= 100  # a bounded queue
    assert 0 <= batching.batch_timeout_micros.value <= 10_000


def test_metrics_are_on_where_the_manifests_look_for_them() -> None:
    config = config_files.read(CONFIG / "monitoring.config", config_files.MonitoringConfig)
    assert config.prometheus_config.enable
    assert config.prometheus_config.path == "/monitoring/prometheus/metrics"


def test_the_tls_file_is_a_template_without_secrets() -> None:
    config = config_files.read(CONFIG / "ssl.config", config_files.SSLConfig)
    assert (config.server_key, config.server_cert, config.client_verify) == ("", "", False)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_batch_sise { value: 8 }", "max_batch_sise"),
        ("max_batch_size: 8", "1:17"),
        ("max_batch_size { value: 0 }", "max_batch_size is 0"),
        ("num_batch_threads { value: -1 }", "num_batch_threads is -1"),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_micros is -1"),
        ("max_batch_size { value: 8 } allowed_batch_sizes: [1, 4]", "which is 8"),
        ("allowed_batch_sizes: [1, 4]", "which is 1000"),
        ("max_batch_size { value: 4 } allowed_batch_sizes: [2, 1, 4]", "must be 1 or more and inc"),
        ("max_batch_size { value: 4 } allowed_batch_sizes: [0, 4]", "must be 1 or more and inc"),
    ],
)
def test_a_batching_file_that_tf_serving_refuses_is_refused(
    tmp_path: Path, text: str, named: str
) -> None:
    (tmp_path / "b.config").write_text(text)
    with pytest.raises(config_files.ConfigFileError) as caught:
        config_files.read_batching(tmp_path / "b.config")
    assert named in str(caught.value) and "b.config" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.config"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(config_files.ConfigFileError, match=r"m\.config cannot be read"):
        config_files.read(path, config_files.MonitoringConfig)


def test_a_file_is_replaced_whole_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "batching.config"
    path.write_text("max_batch_size { value: 7 }")
    path.chmod(0o640)
    batching = config_files.read_batching(path)
    batching.max_batch_size.value = 9
    config_files.write(batching, path, comment="two\nlines")
    assert path.read_text().startswith("# two\n# lines\n")
    assert config_files.read_batching(path).max_batch_size.value == 9
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["batching.config"]
    with pytest.raises(config_files.ConfigFileError, match="cannot be written"):
        config_files.write(batching, tmp_path / "absent" / "b.config")


def test_a_tls_file_is_made_from_pem_files(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(tmp_path / "cert.pem", append=True)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    arguments = [str(tmp_path / "ssl.config"), "--key", str(tmp_path / "key.pem")]
    arguments += ["--cert", str(tmp_path / "cert.pem"), "--client_ca", str(tmp_path / "ca.pem")]
    command = [sys.executable, "-m", "serving.ssl_config", *arguments]
    subprocess.run(command, check=True, cwd=CONFIG.parents[1])
    written = config_files.read(tmp_path / "ssl.config", config_files.SSLConfig)
    assert written.server_key == (tmp_path / "key.pem").read_text()
    assert written.server_cert == (tmp_path / "cert.pem").read_text()
    assert written.custom_ca == (tmp_path / "ca.pem").read_text()
    assert written.client_verify
    assert (tmp_path / "ssl.config").stat().st_mode & 0o077 == 0


def test_a_key_of_another_certificate_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.issue_cert("localhost").cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    with pytest.raises(SystemExit, match="2"):
        ssl_config.main(
            [
                str(tmp_path / "ssl.config"),
                "--key",
                str(tmp_path / "key.pem"),
                "--cert",
                str(tmp_path / "cert.pem"),
            ]
        )
    assert "key.pem" in capsys.readouterr().err
    assert not (tmp_path / "ssl.config").exists()
