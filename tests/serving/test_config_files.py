"""TF Serving's configuration files, as shipped and as written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from pipeline.config import PipelineConfig
from serving import config_files, ssl_config
from serving.server import config
from serving.server.protos import BatchingParameters, MonitoringConfig, SSLConfig

CONFIG = Path(config_files.__file__).parent / "config"


def test_the_models_file_serves_what_the_pipeline_pushes() -> None:
    (model,) = config.read_models(CONFIG / "models.config")
    assert model.name == PipelineConfig().resolve_model_name("cifar-100")
    assert model.base_path == Path("/models") / model.name
    assert (model.policy, model.num_latest, model.labels) == ("latest", 2, {})


@pytest.mark.parametrize("name", ["batching.config", "batching.gpu.config"])
def test_the_batching_files_are_what_tf_serving_accepts(name: str) -> None:
    batching = config.read_batching(CONFIG / name)
    sizes = list(batching.allowed_sizes)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1
    assert sizes[-1] == batching.max_batch_size >= 32
    assert not batching.split
    proto = config.read_text_proto(CONFIG / name, BatchingParameters())
    set_here = {field.name for field, _ in proto.ListFields()}
    assert {"num_batch_threads", "max_enqueued_batches", "batch_timeout_micros"} <= set_here
    assert batching.max_enqueued_batches <= 100  # a bounded queue
    assert batching.timeout <= 0.01


def test_metrics_are_on_where_the_manifests_look_for_them() -> None:
    path = config.read_prometheus_path(CONFIG / "monitoring.config")
    assert path == "/monitoring/prometheus/metrics"


def test_the_tls_file_is_a_template_without_secrets() -> None:
    template = config.read_text_proto(CONFIG / "ssl.config", SSLConfig())
    assert template == SSLConfig()
    with pytest.raises(config.ConfigError, match="PEM text"):
        config.read_ssl(CONFIG / "ssl.config")


def test_a_file_is_replaced_whole_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "monitoring.config"
    path.write_text("prometheus_config {}")
    path.chmod(0o640)
    message = MonitoringConfig(prometheus_config={"enable": True, "path": "/m"})
    config_files.write(message, path, comment="two\nlines")
    assert path.read_text().startswith("# two\n# lines\n")
    assert config.read_prometheus_path(path) == "/m"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["monitoring.config"]
    with pytest.raises(config.ConfigError, match="cannot be written"):
        config_files.write(message, tmp_path / "absent" / "m.config")


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
    written = config.read_ssl(tmp_path / "ssl.config")
    assert written.key == (tmp_path / "key.pem").read_bytes()
    assert written.certificate == (tmp_path / "cert.pem").read_bytes()
    assert written.client_ca == (tmp_path / "ca.pem").read_bytes()
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
