"""Weights & Biases, by its own library."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightlite import distributed
from lightlite.errors import MisconfigurationException
from lightlite.loggers.logger import PathLike, as_dict, as_number, plain, rank_zero_experiment, require
from lightlite.loggers.uploading import UploadingLogger
from lightlite.utilities import files
from lightlite.utilities.rank_zero import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from wandb import Artifact, Run

STEP = "trainer/global_step"
"""The x-axis of every plot."""


class WandbLogger(UploadingLogger):
    """Logs to Weights & Biases.

    The run is made when it is first needed, on rank zero; a run that is open in the process already is used.

    Args:
        name: The run's name; wandb invents one by default.
        save_dir: The folder that wandb writes to, in `wandb/`.
        version: The run's id, to go on with that run.
        offline: Write to the folder only, for `wandb sync` later.
        dir: The same as `save_dir`.
        id: The same as `version`.
        anonymous: Whether to log without an account.
        project: By default the environment variable WANDB_PROJECT, and else "lightning_logs".
        log_model: Whether checkpoints are logged as artifacts, with the aliases "latest" and "best": "all": each
            when it is written; True: those left at the end; False: none.
        experiment: An open run to log to.
        prefix: Put before every value's name, with a "-".
        checkpoint_name: The name of the checkpoints' artifact; "model-" and the run's id by default.
        add_file_policy: "mutable": wandb copies a checkpoint before it uploads it; "immutable": it does not.
        kwargs: More arguments of `wandb.init`, such as `entity`, `group`, `tags`.

    Raises:
        ModuleNotFoundError: Where wandb is not installed.
        MisconfigurationException: For a wrong `log_model`, or one together with `offline`.
    """

    def __init__(
        self,
        name: str | None = None,
        save_dir: PathLike = ".",
        version: str | None = None,
        offline: bool = False,
        dir: PathLike | None = None,
        id: str | None = None,
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: bool | Literal["all"] = False,
        experiment: Run | None = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: Any,
    ) -> None:
        require("wandb", "WandbLogger", "wandb")
        super().__init__(log_model)
        if offline and log_model:
            raise MisconfigurationException(
                f"WandbLogger(offline=True, log_model={log_model!r}): checkpoints cannot be uploaded offline; leave "
                "out one of the two"
            )
        folder = save_dir if save_dir is not None else dir
        self._name = name
        self._project = project or os.environ.get("WANDB_PROJECT", "lightning_logs")
        self._save_dir = None if folder is None else os.fspath(folder)
        self._id = version or id
        self._arguments: dict[str, Any] = {
            "resume": "allow",
            **({"anonymous": "allow"} if anonymous else {}),
            **({"mode": "offline"} if offline else {}),
            **kwargs,
        }
        self._experiment = experiment
        self._prefix = prefix
        self._checkpoint_name = checkpoint_name
        self.add_file_policy = add_file_policy

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """Wandb's run, made when it is first asked for."""
        if self._experiment is None:
            import wandb

            if wandb.run is not None:
                rank_zero_warn(
                    f"WandbLogger logs to the run {wandb.run.id!r}, which is open already; for a run of its own, call "
                    "wandb.finish() before"
                )
                self._experiment = wandb.run
            else:
                self._experiment = self._begin_run()
        return self._experiment

    def _begin_run(self) -> Run:
        import wandb

        if self._save_dir is not None:
            files.make_folder(self._save_dir)
        run = wandb.init(name=self._name, project=self._project, dir=self._save_dir, id=self._id, **self._arguments)
        if self._arguments.get("sync_tensorboard"):
            run.define_metric("*", step_metric="global_step")
        else:
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP, step_sync=True)
        return run

    @property
    def name(self) -> str:
        """The project's name; that of the run is `experiment.name`."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's id; before there is a run, the one that was given."""
        return self._id if self._experiment is None else self._experiment.id

    @property
    def save_dir(self) -> str | None:
        """The folder that wandb writes to."""
        return self._save_dir

    def share(self, broadcast: Callable[[Any], Any]) -> None:
        """Give all ranks the id of rank zero's run."""
        self._id = broadcast(self.experiment.id if distributed.rank() == 0 else None)

    def watch(
        self,
        model: nn.Module,
        log: Literal["gradients", "parameters", "all"] | None = "gradients",
        log_freq: int = 100,
        log_graph: bool = True,
    ) -> None:
        """Record a model's gradients or parameters as histograms, and its graph.

        Args:
            model: The model.
            log: "gradients", "parameters", "all" or None.
            log_freq: Every so many batches.
            log_graph: Whether to record the graph.
        """
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    def unwatch(self, model: nn.Module | None = None) -> None:
        """End `watch`, of one model or of all."""
        self.experiment.unwatch(model)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record values.

        Args:
            metrics: By name: numbers, tensors of one element, or wandb's own types.
            step: The optimizer step.
        """
        values = {name: as_number(value) for name, value in self._prefixed(metrics).items()}
        if step is not None and not self._arguments.get("sync_tensorboard"):
            values[STEP] = step
        self.experiment.log(values)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add to the run's `config`. Classes and functions are recorded by name.

        Args:
            params: The hyper-parameters.
            args: Not used.
            kwargs: Not used.
        """
        self.experiment.config.update(plain(as_dict(params)), allow_val_change=True)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str | int] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Record a table of anything that wandb shows.

        Args:
            key: Its name.
            columns: Names of columns.
            data: Rows.
            dataframe: A DataFrame of pandas, instead of the two.
            step: The optimizer step.
        """
        import wandb

        self.log_metrics({key: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step)

    @rank_zero_only
    def log_text(
        self,
        key: str,
        columns: list[str | int] | None = None,
        data: list[list[str]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Record text, as a table: see `log_table`."""
        self.log_table(key, columns, data, dataframe, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images: tensors, arrays, PIL's, or paths.

        Args:
            key: Their name.
            images: The images.
            step: The optimizer step.
            kwargs: Arguments of `wandb.Image`, each a list with an item for every image: `caption`, `masks`, `boxes`.
        """
        self._log_media("Image", "images", key, images, step, kwargs)

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Record sounds, arrays or paths; see `log_image`. `kwargs` are `wandb.Audio`'s, such as `sample_rate`."""
        self._log_media("Audio", "audios", key, audios, step, kwargs)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Record videos, arrays or paths; see `log_image`. `kwargs` are `wandb.Video`'s, such as `fps`."""
        self._log_media("Video", "videos", key, videos, step, kwargs)

    def _log_media(
        self, kind: str, argument: str, key: str, items: list[Any], step: int | None, more: dict[str, list[Any]]
    ) -> None:
        if not isinstance(items, list):
            raise TypeError(f"{argument}={items!r} is a {type(items).__name__}; give a list")
        for name, values in more.items():
            if len(values) != len(items):
                raise ValueError(f"{name} has {len(values)} items for {len(items)} {argument}; give one for each")
        import wandb

        make = getattr(wandb, kind)
        arguments = [{name: values[index] for name, values in more.items()} for index in range(len(items))]
        self.log_metrics({key: [make(item, **own) for item, own in zip(items, arguments, strict=True)]}, step)

    @staticmethod
    @rank_zero_only
    def download_artifact(
        artifact: str, save_dir: PathLike | None = None, artifact_type: str | None = None, use_artifact: bool = True
    ) -> str:
        """Fetch an artifact from the server.

        Args:
            artifact: Its path: "entity/project/name:alias".
            save_dir: Where it is to go; wandb's own folder by default.
            artifact_type: Its type.
            use_artifact: Whether the open run, if there is one, is recorded to use it.

        Returns:
            The folder it is in.
        """
        import wandb

        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        return str(found.download(root=None if save_dir is None else os.fspath(save_dir)))

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Artifact:
        """Record that the run uses an artifact, which is returned."""
        return self.experiment.use_artifact(artifact, type=artifact_type)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Log the checkpoints that wait for it, after a success. The run stays open, for the next call."""
        if status == "success" and self._experiment is not None:
            self._upload_waiting()

    def _upload(self, path: str, metadata: dict[str, Any], aliases: list[str]) -> None:
        import wandb

        if not self._checkpoint_name:
            self._checkpoint_name = f"model-{self.experiment.id}"
        artifact = wandb.Artifact(name=self._checkpoint_name, type="model", metadata=plain(metadata))
        artifact.add_file(path, name="model.ckpt", policy=self.add_file_policy)
        self.experiment.log_artifact(artifact, aliases=aliases)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None, "_waiting": {}, "_id": self.version}
