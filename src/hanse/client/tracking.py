"""Writers that look like TensorBoard's, MLflow's and Weights & Biases' own. What they are given goes to the job's server.

from hanse.client.tracking import SummaryWriter         # in place of torch.utils.tensorboard
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from hanse.client import log


class _Writer:
    """Values go out with the next answer; there is nothing to flush or close."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SummaryWriter(_Writer):
    """TensorBoard's. Its arguments say where TensorBoard writes, and are not used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def add_scalar(self, tag: str, scalar: float, global_step: int | None = None, *args: Any, **kwargs: Any) -> None:
        """One number."""
        log(tag, scalar, "SCALAR", global_step=global_step)

    def add_scalars(self, tag: str, scalars: Mapping[str, float], global_step: int | None = None, *args: Any, **kwargs: Any) -> None:
        """Several numbers, logged as "tag/name"."""
        log(tag, scalars, "SCALARS", global_step=global_step)

    def add_text(self, tag: str, text: str, global_step: int | None = None, *args: Any, **kwargs: Any) -> None:
        """A text."""
        log(tag, text, "TEXT", global_step=global_step)


class MLflowWriter(_Writer):
    """MLflow's."""

    def log_param(self, key: str, value: Any) -> None:
        """A hyperparameter."""
        log(key, value, "PARAMETER")

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Several hyperparameters."""
        log("params", values, "PARAMETERS")

    def log_metric(self, key: str, value: float, step: int | None = None) -> None:
        """One number."""
        log(key, value, "METRIC", global_step=step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Several numbers."""
        log("metrics", metrics, "METRICS", global_step=step)

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """A text, by the name of the file that MLflow would write it to."""
        log(artifact_file_path, text, "TEXT")

    def set_tag(self, key: str, tag: Any) -> None:
        """A tag of the run."""
        log(key, tag, "TAG")

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Several tags of the run."""
        log("tags", tags, "TAGS")


class WandBWriter(_Writer):
    """Weights & Biases'."""

    def log(self, metrics: Mapping[str, float], step: int | None = None, *args: Any, **kwargs: Any) -> None:
        """Several numbers."""
        log("metrics", metrics, "METRICS", global_step=step)

    def finish(self) -> None:
        """Does nothing."""
