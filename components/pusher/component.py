"""AtomicPusher: pushes a blessed model as a whole version, or not at all."""

from __future__ import annotations

from tfx import types
from tfx.components.pusher import component as pusher_component
from tfx.dsl.components.base import base_component, executor_spec
from tfx.proto import pusher_pb2
from tfx.types import component_spec, standard_artifacts, standard_component_specs

from components.code import CODE_KEY, fingerprint
from components.pusher import executor


class AtomicPusherSpec(standard_component_specs.PusherSpec):
    """Pusher's specification and what is pushed beside the model."""

    PARAMETERS = {
        **standard_component_specs.PusherSpec.PARAMETERS,
        CODE_KEY: component_spec.ExecutionParameter(type=str),
    }
    INPUTS = {
        **standard_component_specs.PusherSpec.INPUTS,
        executor.EXPORTS_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Model, optional=True
        ),
    }


class AtomicPusher(pusher_component.Pusher):
    """TFX's Pusher whose version folder appears complete or not at all, blessed twice.

    Same output. It pushes the model that the infra blessing holds: the one that was served and
    queried, with its warm-up requests.
    """

    SPEC_CLASS = AtomicPusherSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(executor.Executor)

    def __init__(
        self,
        *,
        model_blessing: types.BaseChannel,
        infra_blessing: types.BaseChannel,
        push_destination: pusher_pb2.PushDestination,
        exports: types.BaseChannel | None = None,
    ):
        """Constructs the component.

        Args:
          model_blessing: Evaluator's output.
          infra_blessing: ServingValidator's output.
          push_destination: Of the kind `filesystem`.
          exports: Converter's output, to be pushed with the model in its `assets.extra/exports`.
        """
        spec = AtomicPusherSpec(
            model_blessing=model_blessing,
            infra_blessing=infra_blessing,
            push_destination=push_destination,
            exports=exports,
            code=fingerprint(__package__),
            pushed_model=types.Channel(type=standard_artifacts.PushedModel),
        )
        # Past Pusher's constructor, which builds its own specification.
        base_component.BaseComponent.__init__(self, spec)
