"""MLflow, by its own client."""

from __future__ import annotations

import os
import re
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lightlite import distributed
from lightlite.loggers.logger import as_dict, as_number, flat, plain, rank_zero_experiment, require
from lightlite.loggers.uploading import UploadingLogger
from lightlite.utilities.rank_zero import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from lightlite.callbacks.model_checkpoint import ModelCheckpoint

PARAMETERS_PER_CALL = 100
CHARACTERS_PER_PARAMETER = 250
"""What every MLflow server takes."""
STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED", "aborted": "KILLED"}


class MLFlowLogger(UploadingLogger):
    """Logs to an MLflow server, or to a folder.

    The run is made when it is first needed, on rank zero.

    Args:
        experiment_name: The experiment; made where there is none of that name.
        run_name: The run's; MLflow invents one by default.
        tracking_uri: Where to log: "http://…", "file:…"; by default the environment variable MLFLOW_TRACKING_URI, and
            else `save_dir`.
        tags: Tags of the run.
        save_dir: A folder to log to where there is no tracking URI. MLflow 3 wants MLFLOW_ALLOW_FILE_STORE=true
            in the environment for it.
        log_model: Whether checkpoints are logged as artifacts: "all": each when it is written; True: those left at the
            end; False: none.
        prefix: Put before every value's name, with a "-".
        artifact_location: Where a new experiment's artifacts go; the server's default by default.
        run_id: Go on with that run.
        synchronous: Whether calls wait for the server; None leaves it to MLflow.

    Raises:
        ModuleNotFoundError: Where mlflow is not installed.
        MisconfigurationException: For a wrong `log_model`.
    """

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        save_dir: str | None = "./mlruns",
        log_model: bool | Literal["all"] = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:
        require("mlflow", "MLFlowLogger", "mlflow-skinny")
        super().__init__(log_model)
        self._experiment_name, self._run_name = experiment_name, run_name
        self._tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"file:{save_dir}"
        self.tags = tags
        self._prefix = prefix
        self._artifact_location = artifact_location
        self._run_id = run_id
        self._experiment_id: str | None = None
        self._call_arguments: dict[str, Any] = {} if synchronous is None else {"synchronous": synchronous}
        self._client: MlflowClient | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """MLflow's client. Asking for it makes the run."""
        if self._client is None:
            import mlflow
            from mlflow.tracking import MlflowClient

            mlflow.set_tracking_uri(self._tracking_uri)
            client = MlflowClient(self._tracking_uri)
            if self._run_id is None:
                self._experiment_id = self._find_or_create_experiment(client)
                self._run_id = self._create_run(client, self._experiment_id)
            else:
                self._experiment_id = client.get_run(self._run_id).info.experiment_id
            self._client = client
        return self._client

    def _find_or_create_experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None and found.lifecycle_stage != "deleted":
            return str(found.experiment_id)
        return str(client.create_experiment(self._experiment_name, artifact_location=self._artifact_location))

    def _create_run(self, client: MlflowClient, experiment_id: str) -> str:
        from mlflow.tracking.context.registry import resolve_tags
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        tags = {**(self.tags or {}), **({MLFLOW_RUN_NAME: self._run_name} if self._run_name is not None else {})}
        return str(client.create_run(experiment_id, tags=resolve_tags(tags)).info.run_id)

    @property
    def run_id(self) -> str | None:
        """The run's id. Asking for it makes the run."""
        _ = self.experiment
        return self._run_id

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id. Asking for it makes the run."""
        _ = self.experiment
        return self._experiment_id

    @property
    def name(self) -> str | None:
        """The experiment's id."""
        return self.experiment_id

    @property
    def version(self) -> str | None:
        """The run's id."""
        return self.run_id

    @property
    def save_dir(self) -> str | None:
        """The folder that is logged to; None for a server."""
        scheme, _, path = self._tracking_uri.partition(":")
        return path.removeprefix("//") if scheme == "file" else None

    def share(self, broadcast: Callable[[Any], Any]) -> None:
        """Give all ranks rank zero's run."""
        made = (self.run_id, self.experiment_id) if distributed.rank() == 0 else None
        self._run_id, self._experiment_id = broadcast(made)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record values; in their names, characters that MLflow does not take are left out, with a warning.

        Args:
            metrics: Numbers, or tensors of one element, by name. Strings are left out, with a warning.
            step: The optimizer step.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = []
        for name, value in self._prefixed(metrics).items():
            if isinstance(value, str):
                rank_zero_warn(f"MLFlowLogger.log_metrics leaves out {name}={value!r}: a metric is a number")
                continue
            entries.append(Metric(_allowed(name), as_number(value), now, step or 0))
        self._log_batch(metrics=entries)

    def _log_batch(self, **entries: Any) -> None:
        client = self.experiment  # which makes the run
        client.log_batch(run_id=str(self._run_id), **entries, **self._call_arguments)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Record hyper-parameters: nested ones as "outer/inner", each value's first 250 characters.

        Args:
            params: The hyper-parameters.
            args: Not used.
            kwargs: Not used.
        """
        from mlflow.entities import Param

        entries = [
            Param(name, str(plain(value))[:CHARACTERS_PER_PARAMETER]) for name, value in flat(as_dict(params)).items()
        ]
        for start in range(0, len(entries), PARAMETERS_PER_CALL):
            self._log_batch(params=entries[start : start + PARAMETERS_PER_CALL])

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Log the checkpoints that wait for it, and end the run as FINISHED, FAILED or KILLED."""
        if self._client is None:
            return
        self._upload_waiting()
        self._client.set_terminated(str(self._run_id), STATUS.get(status, status))

    def _settings_key(self, callback: ModelCheckpoint) -> str:
        return "Checkpoint"

    def _upload(self, path: str, metadata: dict[str, Any], aliases: list[str]) -> None:
        import yaml

        client, run_id = self.experiment, str(self.run_id)
        folder = os.path.splitext(os.path.basename(path))[0]
        client.log_artifact(run_id, path, folder)
        with tempfile.TemporaryDirectory() as beside:
            with open(os.path.join(beside, "metadata.yaml"), "w", encoding="utf-8") as file:
                yaml.safe_dump(plain(metadata), file, default_flow_style=False)
            with open(os.path.join(beside, "aliases.txt"), "w", encoding="utf-8") as file:
                file.write(str(aliases))
            client.log_artifacts(run_id, beside, folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_waiting": {}}


def _allowed(name: str) -> str:
    allowed = re.sub(r"[^\w/. -]+", "", name, flags=re.ASCII)
    if allowed != name:
        rank_zero_warn(
            f"MLflow takes letters, digits, '_', '/', '.', '-' and spaces in a metric's name: {name!r} is logged as "
            f"{allowed!r}",
            category=RuntimeWarning,
        )
    return allowed
