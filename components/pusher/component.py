"""AtomicPusher: pushes a blessed model as a whole version, or not at all."""

from __future__ import annotations

from tfx.components.pusher import component as pusher_component
from tfx.dsl.components.base import executor_spec

from components.pusher import executor


class AtomicPusher(pusher_component.Pusher):
    """TFX's Pusher whose version folder appears complete or not at all.

    Same arguments and outputs. `push_destination` must be of the kind `filesystem`.
    """

    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(executor.Executor)
