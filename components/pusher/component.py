"""AtomicPusher: pushes a blessed model as a whole version, or not at all."""

from __future__ import annotations

from tfx import types
from tfx.components.pusher import component as pusher_component
from tfx.dsl.components.base import executor_spec
from tfx.proto import pusher_pb2

from components.pusher import executor


class AtomicPusher(pusher_component.Pusher):
    """TFX's Pusher whose version folder appears complete or not at all, blessed twice.

    Same output. It pushes the model that the infra blessing holds: the one that was served and
    queried, with its warm-up requests.
    """

    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(executor.Executor)

    def __init__(
        self,
        *,
        model_blessing: types.BaseChannel,
        infra_blessing: types.BaseChannel,
        push_destination: pusher_pb2.PushDestination,
    ):
        """Constructs the component.

        Args:
          model_blessing: Evaluator's output.
          infra_blessing: ServingValidator's output.
          push_destination: Of the kind `filesystem`.
        """
        super().__init__(
            model_blessing=model_blessing,
            infra_blessing=infra_blessing,
            push_destination=push_destination,
        )
