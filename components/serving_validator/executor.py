"""Executor of ServingValidator."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tfx import types
from tfx.dsl.components.base import base_executor
from tfx.dsl.io import fileio
from tfx.types import artifact_utils, standard_component_specs
from tfx.utils import io_utils, path_utils

from components import examples
from components.serving_validator import checks, warmup
from dataset.card import DataCard
from serving import server_process
from serving.client import Client
from serving.connection import ServerError
from serving.images import ServingError
from serving.server.config import read_batching

SPLIT_KEY = "split"
BATCHING_KEY = "batching_parameters"

REPORT_FILE = "report.json"
LOG_FILE = "server.log"
REASON_PROPERTY = "reason"
# TFX's Pusher reads these two of an InfraBlessing.
BLESSED_PROPERTY = "blessed"
HAS_MODEL_PROPERTY = "has_model"

# Written by trainer/known_answers.py.
KNOWN_ANSWERS_FILE = os.path.join("assets.extra", "known_answers.json")

_MODEL_NAME = "candidate"
_VERSION = "1"
_IMAGES = 32
_LOAD_SECONDS = 300.0
_REQUEST_SECONDS = 60.0
# A server that ends or does not get ready in time may have met a moment without memory.
_TRIALS = 2


class ValidationError(RuntimeError):
    """The validation could not be done, whatever the model is like."""


class Executor(base_executor.BaseExecutor):
    """Adds warm-up requests to a copy of the model, serves it, queries it, and blesses it or not.

    The InfraBlessing holds the model that was served when it was found good, as TFX's
    InfraValidator leaves it with `make_warmup`, and Pusher pushes that one: what was validated
    and what is pushed are the same files. Trainer's export stays as it is, so that neither another
    batch size to warm up for nor a new signature of the server's is a reason to train again.
    """

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class.

        Raises:
          ExamplesError: There are no examples.
          ValidationError: There are no answers of Trainer's to compare with, or no server that
            could be started.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        model = artifact_utils.get_single_instance(input_dict[standard_component_specs.MODEL_KEY])
        test_examples = artifact_utils.get_single_instance(
            input_dict[standard_component_specs.EXAMPLES_KEY]
        )
        blessing = artifact_utils.get_single_instance(
            output_dict[standard_component_specs.BLESSING_KEY]
        )
        serialized = examples.read(test_examples, exec_properties[SPLIT_KEY], _IMAGES)
        card = examples.read_card(test_examples)
        images = checks.Images(examples.images(serialized, card, test_examples.uri), serialized)
        with tempfile.TemporaryDirectory(prefix="serving-validator-") as work:
            # A local copy, which servers can read wherever the artifacts are.
            served = os.path.join(work, _MODEL_NAME, _VERSION)
            io_utils.copy_dir(path_utils.serving_model_dir(model.uri), served)
            batching_file = Path(work, "batching.config")
            batching_file.write_text(exec_properties[BATCHING_KEY])
            sizes = read_batching(batching_file).allowed_sizes or (1,)
            one = checks.Images(images.pixels[:1], images.examples[:1]).inputs()
            records = warmup.write(served, one, sizes)
            findings = _validate(Path(work), images, card, batching_file, sizes)
            findings.report["warmup_requests"] = records
            _write_outputs(blessing, findings, Path(work), served)


def read_known_answers(model_dir: str, card: DataCard) -> tuple[checks.Images, np.ndarray]:
    """Reads what Trainer's model has answered itself.

    Args:
      model_dir: Folder of the SavedModel.
      card: Of the data that it was trained on.

    Returns:
      (images, float64 [N, classes] probabilities).

    Raises:
      ValidationError: There are none.
    """
    path = os.path.join(model_dir, KNOWN_ANSWERS_FILE)
    try:
        answers = json.loads(Path(path).read_text())
        raw = [base64.b64decode(image) for image in answers["images"]]
        probabilities = np.array(answers["probabilities"], np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise ValidationError(
            f"{KNOWN_ANSWERS_FILE} of the model cannot be read, with which Trainer says what it "
            f"should answer: {error!r}. Train again (--no_cache)."
        ) from error
    return checks.Images(examples.pixels(raw, card, path)), probabilities


def _validate(
    work: Path, images: checks.Images, card: DataCard, batching: Path, sizes: tuple[int, ...]
) -> checks.Findings:
    known, probabilities = read_known_answers(str(work / _MODEL_NAME / _VERSION), card)
    findings = checks.Findings()
    for trial in range(1, _TRIALS + 1):
        try:
            with (
                server_process.serve(
                    work / _MODEL_NAME,
                    _MODEL_NAME,
                    batching=batching,
                    log=work / LOG_FILE,
                    timeout=_LOAD_SECONDS,
                ) as server,
                Client(server.address, _MODEL_NAME, timeout=_REQUEST_SECONDS) as client,
            ):
                try:
                    findings = checks.check(client, images, known, probabilities, sizes)
                except ServingError:
                    server.check()  # says what has become of it, rather than that it is away
                    raise
                findings.report["server"] = server.kind
                findings.report["load_seconds"] = round(server.load_seconds, 3)
                return findings
        except OSError as error:
            raise ValidationError(f"no model server can be started: {error}.") from error
        except server_process.ModelLoadError as error:
            return checks.Findings([str(error)])
        except (server_process.ModelServerError, ServerError) as error:
            logging.warning("Serving the model failed (trial %d of %d): %s", trial, _TRIALS, error)
            findings = checks.Findings([str(error)])
    return findings


def _write_outputs(
    blessing: types.Artifact, findings: checks.Findings, work: Path, served: str
) -> None:
    blessed = not findings.problems
    reason = "; ".join(findings.problems)
    fileio.makedirs(blessing.uri)
    report = {"blessed": blessed, "problems": findings.problems, **findings.report}
    io_utils.write_string_file(
        os.path.join(blessing.uri, REPORT_FILE), json.dumps(report, indent=1) + "\n"
    )
    io_utils.copy_file(str(work / LOG_FILE), os.path.join(blessing.uri, LOG_FILE), overwrite=True)
    if blessed:
        io_utils.copy_dir(served, path_utils.stamped_model_path(blessing.uri))
        logging.info("The model is blessed: served by %s.", findings.report["server"])
    else:
        logging.warning("The model is not blessed: %s.", reason)
    marker = "INFRA_BLESSED" if blessed else "INFRA_NOT_BLESSED"
    io_utils.write_string_file(os.path.join(blessing.uri, marker), "")
    blessing.set_int_custom_property(HAS_MODEL_PROPERTY, int(blessed))
    blessing.set_string_custom_property(REASON_PROPERTY, reason)
    blessing.set_int_custom_property(BLESSED_PROPERTY, int(blessed))
