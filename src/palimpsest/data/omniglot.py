"""Omniglot: characters of many alphabets, each written once by twenty people, from the published archives."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingDependency
from palimpsest.core.records import Records
from palimpsest.data.registry import dataset

IMAGE = re.compile(r"(?P<alphabet>[^/]+)/(?P<character>character\d+)/\d+_(?P<drawer>\d+)\.png$")
HOW = (
    "Download images_background.zip, images_background_small1.zip, ... from github.com/brendenlake/omniglot and "
    "name the archive, a folder of archives, or the folder that one was unpacked into."
)


@dataset("omniglot")
def omniglot(root: str | Path, side: int = 28) -> Records:
    """Binary images, input [1, side, side] in [0, 1] with strokes bright, one label for each character.

    Columns "alphabet", "character" and "drawer" (1 to 20), so that one writer or alphabet can be forgotten; ids
    are "Greek/character07/03", alphabet, character and drawer. Source: Lake, Salakhutdinov, Tenenbaum, Science 2015 (MIT).

    Args:
        root: A published archive, a folder with some, or a folder that one was unpacked into.
        side: In pixels; the published images have 105.

    Raises:
        InvalidRecords: If there are no such files.
        MissingDependency: Without Pillow.
    """
    if side < 1:
        raise InvalidHyperparameter(f"side must be at least 1 pixel, not {side}.")
    try:
        from PIL import Image
    except ImportError as missing:
        raise MissingDependency("pillow", "vision") from missing
    found: dict[tuple[str, str, int], NDArray[np.float32]] = {}
    for name, content in _files(Path(root)):
        match = IMAGE.search(name)
        if match is None:
            continue
        with Image.open(io.BytesIO(content)) as image:
            small = image.convert("L").resize((side, side), Image.Resampling.BOX)
        key = match["alphabet"], match["character"], int(match["drawer"])
        found[key] = 1 - np.asarray(small, np.float32) / 255.0
    if not found:
        raise InvalidRecords(f"{root} holds no images of Omniglot. {HOW}")
    keys = sorted(found)
    characters = sorted({key[:2] for key in keys})
    images = torch.from_numpy(np.stack([found[key] for key in keys])).unsqueeze(1)
    labels = torch.tensor([characters.index(key[:2]) for key in keys])
    return Records(
        TensorDataset(images, labels),
        ids=[f"{alphabet}/{character}/{drawer:02d}" for alphabet, character, drawer in keys],
        columns={
            "alphabet": np.array([key[0] for key in keys], dtype=object),
            "character": np.array(["/".join(key[:2]) for key in keys], dtype=object),
            "drawer": np.array([key[2] for key in keys]),
        },
    )


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of all images."""
    if root.is_dir():
        archives = sorted(root.glob("*.zip"))
        for path in sorted(root.rglob("*.png")):
            yield path.as_posix(), path.read_bytes()
    else:
        archives = [root]
    for archive in archives:
        try:
            with zipfile.ZipFile(archive) as opened:
                for name in sorted(opened.namelist()):
                    if PurePosixPath(name).suffix == ".png":
                        yield name, opened.read(name)
        except (OSError, zipfile.BadZipFile) as problem:
            raise InvalidRecords(f"{archive} cannot be read as a zip archive: {problem}. {HOW}") from problem
