"""TFX Tuner's `tuner_fn`: short trainings of a preset with other hyperparameters."""

from __future__ import annotations

import contextlib
import gc
import io
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import keras_tuner
import tensorflow as tf
from keras_tuner.engine import base_tuner
from keras_tuner.engine import trial as trial_module

from trainer import engines, hyperparameters, jax_engine, run
from trainer.hyperparameters import AUGMENTATION, DEPTH, LEARNING_RATE, WEIGHT_DECAY
from trainer.on_jax.process import OutOfMemoryError
from trainer.preset import Preset

if TYPE_CHECKING:
    from tfx.components.trainer.fn_args_utils import FnArgs

# Of the last epoch: it is the last epoch's weights that Trainer exports.
OBJECTIVE = keras_tuner.Objective("val_top_1_accuracy", "max")

_LEARNING_RATE_RANGE = 4.0
_WEIGHT_DECAY_RANGE = 10.0
_MAX_AUGMENTATION = 2.0


class TuningError(keras_tuner.errors.FatalError):
    """A trial failed; KerasTuner goes on after any other error, and takes it for a bad result."""


class TunerFnResult(NamedTuple):
    """What TFX's executor expects, without importing TFX.

    Attributes:
      tuner: Its `search` is called.
      fit_kwargs: With these arguments.
    """

    tuner: base_tuner.BaseTuner
    fit_kwargs: dict[str, Any]


def tuner_fn(fn_args: FnArgs) -> TunerFnResult:
    """Prepares the search for good hyperparameters; TFX's Tuner calls this.

    Each trial is a training of its own, a fraction as long as Trainer's will be. The first one has
    the preset's own hyperparameters: what is found is no worse than these, as far as trials tell.

    Args:
      fn_args: As for `trainer.run.run_fn`, without `serving_model_dir`, `model_run_dir` and
        `hyperparameters`; `custom_config` has the keys `trials` and `trial_fraction` besides.

    Raises:
      trainer.engines.EngineError: The engine cannot be used.
      trainer.export.ExportError: The transform graph is of other code than this.
      trainer.warm_start.WarmStartError: The model to start from does not fit.
      ValueError: A hyperparameter is out of range, or a split is empty.
    """
    preset, inputs, _ = run.prepare(fn_args)
    config = fn_args.custom_config
    trial_preset = hyperparameters.shorten(preset, config["trial_fraction"])
    oracle = _Oracle(
        objective=OBJECTIVE,
        max_trials=config["trials"],
        # KerasTuner's own are three for each hyperparameter: more than most searches have trials.
        num_initial_points=max(2, config["trials"] // 3),
        hyperparameters=search_space(preset, fixed_architecture=inputs.base is not None),
        # However many: `on_search_end` says it when none was finished.
        max_consecutive_failed_trials=config["trials"] + 1,
        tune_new_entries=False,
        allow_new_entries=False,
        seed=config["seed"] or 1,  # 0 would draw one
    )
    key = run.run_key(config, inputs, {})
    tuner = PresetTuner(oracle, trial_preset, inputs, config["checkpoint_dir"], key)
    return TunerFnResult(tuner, {})


def search_space(preset: Preset, *, fixed_architecture: bool) -> keras_tuner.HyperParameters:
    """Says what is searched for, around a preset's own hyperparameters.

    Args:
      preset: What is 0 or off in it stays so.
      fixed_architecture: Whether the number of blocks stays, as weights to start from want it.

    Returns:
      Learning rate, weight decay, number of blocks and strength of the augmentation, with the
      preset's as defaults.
    """
    space = keras_tuner.HyperParameters()
    for name, reach in ((LEARNING_RATE, _LEARNING_RATE_RANGE), (WEIGHT_DECAY, _WEIGHT_DECAY_RANGE)):
        value = getattr(preset.training, name)
        if value:
            space.Float(name, value / reach, value * reach, sampling="log", default=value)
    layers = preset.architecture.transformer_layers
    if not fixed_architecture:
        reach = max(1, layers // 2)
        space.Int(DEPTH, max(1, layers - reach), layers + reach, default=layers)
    if hyperparameters.is_augmented(preset):
        space.Float(AUGMENTATION, 0.0, _MAX_AUGMENTATION, step=0.25, default=1.0)
    return space


class _Oracle(keras_tuner.oracles.BayesianOptimizationOracle):
    """Tries the defaults first, then at random, then where a model of the results is best."""

    def get_best_trials(self, num_trials: int = 1) -> list[trial_module.Trial]:
        """The best ones; of equal ones the earliest, so that a tie goes to the preset's own.

        KerasTuner's order of equal ones is another after an interruption.
        """
        done = trial_module.TrialStatus.COMPLETED
        finished = [trial for trial in self.trials.values() if trial.status == done]
        best = sorted(finished, key=lambda trial: (-trial.score, int(trial.trial_id)))
        return best[:num_trials]

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        if not self.trials:
            values = {item.name: item.default for item in self.hyperparameters.space}
            return {"status": trial_module.TrialStatus.RUNNING, "values": values}
        proposal: dict[str, Any] = super().populate_space(trial_id)
        return proposal


class PresetTuner(base_tuner.BaseTuner):
    """Trains a preset with the hyperparameters of each trial, and says how it went.

    Finished trials are kept until the search ends: one that was interrupted goes on after them.

    Args:
      oracle: Chooses the hyperparameters.
      preset: As long as a trial is to be.
      inputs: What is trained on.
      directory: Where trials are kept.
      name: Names this search there.
    """

    def __init__(
        self,
        oracle: keras_tuner.Oracle,
        preset: Preset,
        inputs: run.Inputs,
        directory: str,
        name: str,
    ):
        self._preset = preset
        self._inputs = inputs
        self._began = 0.0  # the trial
        oracle.verbose = 0  # no tables; see `on_trial_end`
        with contextlib.redirect_stdout(io.StringIO()):  # says that it reloads
            super().__init__(oracle, directory=directory, project_name=f"tuning-{name}")
        if finished := len(oracle.end_order):
            print(f"  continuing after trial {finished}", flush=True)

    def run_trial(self, trial: trial_module.Trial) -> dict[str, float]:
        """Trains.

        Returns:
          The objective, of the last epoch.

        Raises:
          TuningError: Training failed.
          keras_tuner.errors.FailedTrialError: There was not enough memory for it.
        """
        values = trial.hyperparameters.values
        print(f"  trial {_number(trial)}/{self.oracle.max_trials}: {describe(values)}", flush=True)
        self._began = time.monotonic()
        # Graphs and weights of the trial before would stay until the end.
        keras.utils.clear_session()
        gc.collect()
        try:
            preset = hyperparameters.apply(self._preset, values)
            score = self._score(preset)
        except (tf.errors.ResourceExhaustedError, OutOfMemoryError) as error:
            raise keras_tuner.errors.FailedTrialError(f"not enough memory: {error}") from error
        except Exception as error:
            raise TuningError(f"trial {_number(trial)} ({describe(values)}): {error}") from error
        return {OBJECTIVE.name: score}

    def _score(self, preset: Preset) -> float:
        """The objective after the last epoch of a training."""
        if self._inputs.engine == engines.JAX:
            return jax_engine.fit(preset, self._inputs).result.history[-1][OBJECTIVE.name]
        network = run.build_network(preset, self._inputs)
        return run.fit(network, self._inputs, preset)[OBJECTIVE.name][-1]

    def on_trial_end(self, trial: trial_module.Trial) -> None:
        """Keeps the result and prints it."""
        super().on_trial_end(trial)
        seconds = time.monotonic() - self._began
        if trial.status != trial_module.TrialStatus.COMPLETED:
            text = "not enough memory"
        else:
            best = self.oracle.get_best_trials()[0].trial_id == trial.trial_id
            score = self.oracle.get_trial(trial.trial_id).score
            text = f"validation top-1 {score:.4f}{', the best so far' if best else ''}"
        print(
            f"  trial {_number(trial)}/{self.oracle.max_trials} took {seconds:.0f} s: {text}",
            flush=True,
        )

    def on_search_end(self) -> None:
        """Removes the trials.

        Raises:
          TuningError: None was finished.
        """
        finished = trial_module.TrialStatus.COMPLETED
        if not any(trial.status == finished for trial in self.oracle.trials.values()):
            raise TuningError(
                f"there was not enough memory for any of {len(self.oracle.trials)} trials: use a "
                "smaller --batch_size or a smaller preset."
            )
        tf.io.gfile.rmtree(self.project_dir)

    def search_space_summary(self, extended: bool = False) -> None:
        """Prints nothing: each trial says what it tries."""

    def results_summary(self, num_trials: int = 10) -> None:
        """Prints nothing: each trial said how it went, and the run's summary has the best."""


def describe(values: Mapping[str, Any]) -> str:
    """Writes hyperparameters for people."""
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def _number(trial: trial_module.Trial) -> int:
    return int(trial.trial_id) + 1
