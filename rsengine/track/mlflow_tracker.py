"""MLflow, at the server or the folder that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from rsengine.run.files import write_atomically
from rsengine.track import TrackedRun

ID_FILE = ".mlflow-id"


class MlflowTracker:
    """One run in the experiment ``rsengine``, or in $MLFLOW_EXPERIMENT_NAME. A resumed run goes on in the same one."""

    def begin(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        # A client, not mlflow.start_run: the active run of the process belongs to whoever calls from a notebook.
        self.client, self.metric = MlflowClient(), Metric
        identity = run.folder / ID_FILE
        if run.step and identity.exists():
            self.id = identity.read_text()
            self.client.set_terminated(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rsengine")
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.id = self.client.create_run(number, run_name=run.name).info.run_id
        write_atomically(identity, self.id.encode())
        params = [Param(key, str(value)[:6000]) for key, value in run.settings.items()]
        for first in range(0, len(params), 100):  # as many as one call may carry
            self.client.log_batch(self.id, params=params[first : first + 100])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[self.metric(name, value, now, step) for name, value in values.items()])

    def picture(self, name: str, path: Path, step: int) -> None:
        self.client.log_artifact(self.id, str(path), "pictures")

    def finish(self, result: Mapping[str, float], completed: bool) -> None:
        self.scalars(result, 0)
        self.client.set_terminated(self.id, status="FINISHED" if completed else "KILLED")


make = MlflowTracker
