"""Where the ranks' output goes."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs


class RankLogs(LogsSpecs):
    """Where the ranks' output goes: `<folder>/attempt_<n>/rank_<r>/stdout.log`, `stderr.log` and `error.json`.

    Args:
        folder: The root.
        output: As in `Launch`.
    """

    def __init__(self, folder: str, output: str) -> None:
        super().__init__(log_dir=folder)
        self._output = output

    @property
    def root_log_dir(self) -> str:
        """The root folder."""
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files of one attempt; each rank learns of its own through `envs`."""
        destination = LogsDest()
        for local_rank, env in envs.items():
            folder = Path(self.root_log_dir, f"attempt_{env['TORCHELASTIC_RESTART_COUNT']}", f"rank_{env['RANK']}")
            folder.mkdir(parents=True, exist_ok=True)
            error_file = folder / "error.json"
            error_file.unlink(missing_ok=True)
            destination.error_files[local_rank] = env["TORCHELASTIC_ERROR_FILE"] = str(error_file)
            to_terminal = self._output == "first" and env["RANK"] == "0"
            destination.stdouts[local_rank] = "" if to_terminal else str(folder / "stdout.log")
            destination.stderrs[local_rank] = "" if to_terminal else str(folder / "stderr.log")
            if to_terminal:
                env["LIGHTLITE_FAILURE_SHOWN_BY_LAUNCHER"] = "1"
            if self._output == "tee":
                destination.tee_stdouts[local_rank] = destination.stdouts[local_rank]
                destination.tee_stderrs[local_rank] = destination.stderrs[local_rank]
        return destination
