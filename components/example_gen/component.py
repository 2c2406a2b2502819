"""Cifar100ExampleGen: a TFX ExampleGen for CIFAR-100's binary layout."""

from __future__ import annotations

from tfx import types
from tfx.components.example_gen import component as example_gen_component
from tfx.components.example_gen import utils
from tfx.dsl.components.base import base_beam_component, base_driver, executor_spec
from tfx.proto import example_gen_pb2
from tfx.types import component_spec, standard_artifacts, standard_component_specs

from components.code import CODE_KEY, fingerprint
from components.example_gen import executor
from dataset import format as dataset_format
from dataset.card import TEST, TRAIN, VALIDATION


class Cifar100ExampleGenSpec(component_spec.ComponentSpec):
    """FileBasedExampleGen's specification and what identifies the data."""

    PARAMETERS = {
        **standard_component_specs.FileBasedExampleGenSpec.PARAMETERS,
        executor.DATASET_NAME_KEY: component_spec.ExecutionParameter(type=str),
        executor.FINGERPRINT_KEY: component_spec.ExecutionParameter(type=str),
        executor.LIMIT_KEY: component_spec.ExecutionParameter(type=int, optional=True),
        CODE_KEY: component_spec.ExecutionParameter(type=str),
    }
    INPUTS = standard_component_specs.FileBasedExampleGenSpec.INPUTS
    OUTPUTS = standard_component_specs.FileBasedExampleGenSpec.OUTPUTS


class Cifar100ExampleGen(example_gen_component.FileBasedExampleGen):
    """Ingests train.bin and test.bin into the splits train, validation and test.

    The last tenth of train.bin is the validation split. Each tf.Example holds `image` (3,072 raw
    bytes: uint8, 32 rows x 32 columns x RGB), `label` and `superclass`. The class names are
    written beside the splits, in dataset.json.

    The fingerprint of the data is an execution property computed by whoever submits the pipeline,
    in place of the one that FileBasedExampleGen's driver derives from modification times: it is
    part of the cache key also where drivers do not run, and it changes when and only when the
    contents do.
    """

    SPEC_CLASS = Cifar100ExampleGenSpec
    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(executor.Executor)
    DRIVER_CLASS = base_driver.BaseDriver

    def __init__(
        self,
        input_base: str,
        *,
        dataset_name: str,
        content_fingerprint: str,
        limit: int | None = None,
    ):
        """Constructs the component.

        Args:
          input_base: Folder with train.bin, test.bin, fine_label_names.txt and
            coarse_label_names.txt.
          dataset_name: `cifar-100` or `synthetic`; travels with the data into the model.
          content_fingerprint: Identifies the contents of the folder; see
            `dataset.format.fingerprint`.
          limit: Keep at most so many examples of each split, class-balanced. None or 0 keeps all.
        """
        input_config = example_gen_pb2.Input(
            splits=[
                example_gen_pb2.Input.Split(name=name, pattern=file)
                for name, file in (
                    (TRAIN, dataset_format.TRAIN_FILE),
                    (VALIDATION, dataset_format.TRAIN_FILE),
                    (TEST, dataset_format.TEST_FILE),
                )
            ]
        )
        spec = Cifar100ExampleGenSpec(
            input_base=input_base,
            input_config=input_config,
            output_config=utils.make_default_output_config(input_config),
            output_data_format=example_gen_pb2.FORMAT_TF_EXAMPLE,
            output_file_format=example_gen_pb2.FORMAT_TFRECORDS_GZIP,
            examples=types.Channel(type=standard_artifacts.Examples),
            **{
                executor.DATASET_NAME_KEY: dataset_name,
                executor.FINGERPRINT_KEY: content_fingerprint,
                executor.LIMIT_KEY: limit,
                CODE_KEY: fingerprint(__package__),
            },
        )
        # Past FileBasedExampleGen's constructor, which builds its own specification.
        base_beam_component.BaseBeamComponent.__init__(self, spec=spec)
