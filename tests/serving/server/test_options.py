"""Flags and configuration files that the server refuses, without loading TensorFlow."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.server import config, options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --model_base_path"),
        (["--model_base_path=m", "--use_alts_credentials"], "--use_alts_credentials of tensorflow"),
        (["--model_base_path=m", "--num_load_threads=2"], "--num_load_threads of tensorflow"),
        (["--model_base_path=m", "--port=0"], "0 is less than 1"),
        (["--model_base_path=m", "--port=http"], "invalid whole number value: 'http'"),
        (["--model_base_path=m", "--enable_model_warmup=maybe"], "neither true nor false"),
        (["--model_base_path=m", "--file_system_poll_wait_seconds=-1"], "is negative"),
    ],
)
def test_refuses_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        options.parse(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_takes_flags_as_tensorflow_model_server_does():
    parsed = options.parse(["--model_base_path=m", "--enable_model_warmup=false", "--port", "9"])
    assert parsed.enable_model_warmup is False
    assert parsed.port == 9
    assert parsed.host == "127.0.0.1"
    assert parsed.grpc_max_threads == parsed.max_concurrent_requests + 16


NONE_AT_ALL = "model_version_policy { specific {} }"
MODEL = 'name: "m" base_path: "/m" model_platform: "tensorflow"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model_config_list names no model"),
        ("model_config_list { config { nam: 1 } }", "not a text proto of ModelServerConfig.*nam"),
        ('model_config_list { config { name: "m" base_path: "/m" } }', "model m needs"),
        (
            f"model_config_list {{ config {{ {MODEL.replace('/m', 'm')} }} }}",
            "to have an absolute path",
        ),
        (
            f"model_config_list {{ config {{ {MODEL} }} config {{ {MODEL} }} }}",
            "Illegal to list model m multiple times in config list",
        ),
        (
            f"model_config_list {{ config {{ {MODEL} logging_config {{}} }} }}",
            "logging_config is not supported",
        ),
        (
            f"model_config_list {{ config {{ {MODEL} {NONE_AT_ALL} }} }}",
            "names no versions",
        ),
        ("custom_model_config {}", "custom_model_config is not supported"),
    ],
)
def test_refuses_model_configs(text: str, message: str, tmp_path: Path):
    file = tmp_path / "models.config"
    file.write_text(text)
    with pytest.raises(config.ConfigError, match=message) as failure:
        config.read_models(file)
    assert str(file) in str(failure.value)


def test_reads_model_configs(tmp_path: Path):
    file = tmp_path / "models.config"
    file.write_text(
        f"""model_config_list {{
          config {{ {MODEL} model_version_policy {{ latest {{ num_versions: 2 }} }}
                    version_labels {{ key: "stable" value: 7 }} }}
          config {{ name: "n" base_path: "/n" model_platform: "tensorflow"
                    model_version_policy {{ all {{}} }} }} }}"""
    )
    first, second = config.read_models(file)
    assert first == config.Model("m", Path("/m"), num_latest=2, labels={"stable": 7})
    assert second == config.Model("n", Path("/n"), policy="all")
