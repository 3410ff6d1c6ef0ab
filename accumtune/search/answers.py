"""What a tuner answers about its search: while it runs, when it has ended, and on another day."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras_tuner

from accumtune.config import TrainingConfig
from accumtune.search.chronicle import Chronicle
from accumtune.search.results.selection import Candidate, Policy
from accumtune.tracking.records import SearchRecord
from accumtune.worker.trial_weights import build_as_trained, load_weights


class Answers(keras_tuner.Tuner):
    """A Keras Tuner tuner that answers from its search's journals."""

    oracle: Any
    _chronicle: Chronicle

    def record(self) -> SearchRecord:
        """The search as its journals tell it, trials included."""
        return self._chronicle.record()

    def candidates(self) -> list[Candidate]:
        """Every trained configuration within the budget, and the other micro-batches of its effective batch.

        Those are marked `is_trained=False`: same training, with predicted memory and speed.
        """
        return self._chronicle.candidates()

    def pareto_front(self) -> list[Candidate]:
        """The candidates that no other beats in objective, peak memory and throughput, best objective first."""
        return self._chronicle.pareto_front()

    def get_best_config(self, policy: Policy = "quality", tolerance: float = 0.01) -> TrainingConfig:
        """The configuration to train with.

        One that was not trained in its own micro-batch is run for a few updates under the budget first, once; where it
        does not hold, the next best is taken. That needs the data of a `search()` in this process.

        Args:
            policy: `"quality"` (best objective within the tolerance, then fastest, then smallest), `"memory"`,
                `"throughput"`, `"balanced"`, or a function from candidates to one of them.
            tolerance: differences of the objective below this share are taken for noise.

        Returns:
            A `TrainingConfig`; its `reason` says in one sentence why it won.

        Raises:
            NoResultError: no trial has completed within the budget.
        """
        return self._chronicle.config(self._chronicle.choose(policy, tolerance, self._trial_run()))

    def _trial_run(self) -> Callable[[Candidate], bool] | None:
        """Tells whether a candidate runs within the budget; None where nothing can be run."""
        return None

    def results_summary(self, num_trials: int = 10) -> None:
        """Prints the candidates, best first; the Pareto front is marked."""
        print(self._chronicle.summary(num_trials))

    def get_best_hyperparameters(self, num_trials: int = 1) -> list[Any]:
        """Keras Tuner's, without its padding by failed trials."""
        return [trial.hyperparameters for trial in self._best_trials(num_trials)]

    def get_best_models(self, num_models: int = 1) -> list[Any]:
        """Models with the weights of their best epoch, accumulating as they were trained."""
        return [self.load_model(trial) for trial in self._best_trials(num_models)]

    def load_model(self, trial: Any) -> Any:
        """Keras Tuner's, also where the model's own `build` leaves layers to its first call.

        Raises:
            ValueError: the weights do not fit the model.
        """
        model = self.hypermodel.build(trial.hyperparameters)
        weights_file = Path(self._get_checkpoint_fname(trial.trial_id))
        build_as_trained(model, weights_file)
        load_weights(model, weights_file)
        return model

    def _best_trials(self, count: int) -> list[Any]:
        completed = [t for t in self.oracle.trials.values() if t.status == "COMPLETED"]
        reused = {trial.trial_id for trial in self.record().with_status("reused")}
        trained = [trial for trial in completed if trial.trial_id not in reused]
        direction = self.oracle.objective.direction
        return sorted(trained, key=lambda trial: trial.score, reverse=direction == "max")[:count]

    @property
    def ui_command(self) -> str:
        """The command that opens this search in the MLflow UI."""
        return self._chronicle.ui_command

    @property
    def ui_address(self) -> str:
        """Where the UI shows this search, once the command runs."""
        return self._chronicle.ui_address
