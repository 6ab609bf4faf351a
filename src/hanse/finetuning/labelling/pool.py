"""Where what is to be labelled comes from: a folder or table that the current version scores, or an .npz file that has all."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from hanse.errors import ConfigError
from hanse.finetuning.data import UNKNOWN, Images, Problem, Table, load, prepared
from hanse.finetuning.labelling.queue import Pool


def read_pool(source: Path, project: Path, problems: list[Problem] | None = None) -> Pool:
    """The images in a folder, or the rows of a table, as the current version of the project scores them; or the pool in an .npz file.

    Rows whose label is known are left out. problems: gets what cannot be used; without it, the first is an error.
    Raises ConfigError, also if no version is deployed.
    """
    if source.suffix == ".npz":
        return read_npz(source)
    from hanse.finetuning.models import embed, score
    from hanse.finetuning.serving import load_scorer, resizes
    from hanse.finetuning.versions import Versions

    versions = Versions(project)
    if (version := versions.current) is None:
        raise ConfigError(f"{project} has no current version to score with", hint="Deploy one first, or give an .npz file with scores.")
    module = load_scorer(project, version.digest).module
    path, is_image = str(source.resolve()), version.schema.kind == "image"
    spec = Images(folder=path, resize=resizes(project)) if is_image else Table(file=path)
    data = load(spec, version.schema, project, problems=problems)
    data = data.select(data.labels == UNKNOWN)
    inputs = prepared(data, version.schema)
    features = {} if is_image else dict(zip(version.schema.columns, data.inputs.T.astype(str).tolist(), strict=True))
    return Pool(
        names=data.names,
        scores=score(module, inputs),
        images=[source / name for name in data.names] if is_image else None,
        embeddings=embed(module, inputs, versions.project.model.embedding),
        columns={**data.columns, **features},
    )


def read_npz(path: Path) -> Pool:
    """A pool from the array `scores` and, if they are there, `images` (uint8), `embeddings` and `names`; other arrays of text are columns.

    Raises ConfigError if there are no scores or the arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        scores = arrays.pop("scores").astype(np.float64)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except KeyError as error:
        raise ConfigError(
            f"{path} has no array `scores`", hint="It needs scores, and may have names, images, embeddings, and columns of text."
        ) from error
    images, embeddings = arrays.pop("images", None), arrays.pop("embeddings", None)
    if images is not None and images.ndim == 3:
        images = images[..., None]
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4):
        raise ConfigError(f"{path}: images are {images.dtype} of shape {images.shape}: they must be uint8 (n, height, width, channels)")
    names = arrays.pop("names", None)
    return Pool(
        names=[f"{path.stem}/{row:06d}" for row in range(len(scores))] if names is None else [str(name) for name in names],
        scores=scores,
        images=images,
        embeddings=None if embeddings is None else embeddings.reshape(len(embeddings), -1).astype(np.float32),
        columns={name: [str(value) for value in array] for name, array in arrays.items() if array.dtype.kind == "U"},
    )
