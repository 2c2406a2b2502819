"""The optimizer of a preset, and a network made ready to be trained by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from trainer import losses
from trainer.muon import CLASSIFIER, Muon
from trainer.preset import Preset, Training
from trainer.schedule import Schedule

# Of a model's variables: what no optimizer decays where a preset says `decay_matrices_only`, and
# what Muon leaves to Adam (with biases and all else of one axis).
_NOT_DECAYED = ("bias", "gamma", "beta", "embedding", "temperature")
_NOT_ORTHOGONAL = ("embedding", CLASSIFIER, "score", "depthwise")


class AdamW(keras.optimizers.AdamW):
    """Keras's, with a learning rate of its own for the classifier.

    Attributes:
        base_ratio: Factor of the learning rate of all variables but the classifier's.
    """

    base_ratio = 1.0

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable by its gradient, of the same shape."""
        # With TensorFlow, `variable` is not Keras's, which alone has a path.
        reference = self._trainable_variables[self._get_variable_index(variable)]
        if self.base_ratio != 1 and CLASSIFIER not in reference.path:
            learning_rate = learning_rate * self.base_ratio
        super().update_step(gradient, variable, learning_rate)


def build_optimizer(
    training: Training,
    *,
    steps_per_epoch: int | None,
    muon: Callable[..., Muon] = Muon,
    other_classes: bool = False,
) -> keras.optimizers.Optimizer:
    """Builds an optimizer, with its learning rate's schedule and its weight decay.

    With `train_minutes` the learning rate is a variable, which `trainer.callbacks.TimeBudget` sets.

    Args:
        training: The settings.
        steps_per_epoch: Optimizer steps in one epoch; with `epochs` the length of the schedule.
            None for a learning rate that is a variable, which the caller sets.
        muon: Makes the optimizer where it is Muon: the class, or one like it.
        other_classes: Whether the weights are those of a model of other classes, but for the
            classifier's.

    Returns:
        A new optimizer.

    Raises:
        ValueError: `steps_per_epoch` is below 1.
    """
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise ValueError(
            f"steps_per_epoch is {steps_per_epoch}: there must be at least one step. "
            f"Use more training images, or a batch_size below {training.batch_size}."
        )
    learning_rate: Any = training.learning_rate
    is_constant = training.learning_rate_schedule == "constant" or training.train_minutes
    if steps_per_epoch is not None and not is_constant:
        learning_rate = Schedule(training, training.epochs * steps_per_epoch)
    options: dict[str, Any] = {
        "weight_decay": training.weight_decay,
        "global_clipnorm": training.gradient_clip_norm or None,
        "epsilon": training.adam_epsilon,
    }
    if training.ema_momentum:
        options |= {"use_ema": True, "ema_momentum": training.ema_momentum}
    base_ratio = training.base_rate_ratio if other_classes else 1.0
    betas = training.adam_beta_1, training.adam_beta_2
    if training.optimizer == "muon":
        optimizer = muon(
            learning_rate,
            exclude_layers=_NOT_ORTHOGONAL,
            projections={"qkv_kernel": 3},
            orthogonalization_dtype=keras.config.dtype_policy().compute_dtype,
            momentum=training.muon_momentum,
            ns_steps=training.muon_steps,
            adam_lr_ratio=training.adam_rate_ratio,
            adam_beta_1=betas[0],
            adam_beta_2=betas[1],
            base_ratio=base_ratio,
            **options,
        )
    else:
        optimizer = AdamW(learning_rate, beta_1=betas[0], beta_2=betas[1], **options)
        optimizer.base_ratio = base_ratio
    if training.decay_matrices_only:
        optimizer.exclude_from_weight_decay(var_names=list(_NOT_DECAYED))
    return optimizer


def compile_network(
    network: keras.Model,
    preset: Preset,
    *,
    steps_per_epoch: int,
    class_weights: Sequence[float] | None = None,
    other_classes: bool = False,
) -> None:
    """Makes a network ready for `fit`; under the dtype policy that it was built under.

    Args:
        network: Of `trainer.network.model.build_model`.
        preset: Gives optimizer, loss and metrics.
        steps_per_epoch: See `build_optimizer`.
        class_weights: See `trainer.losses.build_loss`.
        other_classes: See `build_optimizer`.

    Raises:
        ValueError: See `build_optimizer`.
    """
    network.compile(
        optimizer=build_optimizer(
            preset.training, steps_per_epoch=steps_per_epoch, other_classes=other_classes
        ),
        loss=losses.build_loss(preset, class_weights),
        metrics=losses.build_metrics(preset, network.output_shape[-1]),
    )
