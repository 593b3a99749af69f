"""Content hashes of records and architectures: what a trained model depends on beside its recipe and seed."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from torch import Tensor, nn

from palimpsest.core.records import Records


def records_fingerprint(records: Records) -> str:
    """A hash of ids and columns, and of all values if the data lie in memory (tensors, or a list of texts).

    Of data that are read from disk record by record only ids and columns are hashed: reading everything
    once more to hash it may take hours.
    """
    digest = hashlib.sha256("\0".join(records.ids).encode())
    for name in records.columns:
        column = records.column(name)
        digest.update(f"{name}:{column.dtype}".encode())
        digest.update("\0".join(map(str, column)).encode() if column.dtype == object else column.tobytes())
    for name, tensor in (records.tensors or {}).items():
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    if records.listed:
        for item in records:
            digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:20]


def record_digests(records: Records) -> list[bytes]:
    """A hash per record: of its id and of its values if the data lie in memory, else of id and columns.

    Whatever was trained on a choice of the records can so be named by what it was trained on.
    """
    fields = records.tensors or {name: records.column(name) for name in records.columns}
    rows = [
        values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        for _, values in sorted(fields.items())
    ]
    digests: list[bytes] = []
    for position, identifier in enumerate(records.ids):
        digest = hashlib.blake2b(identifier.encode(), digest_size=16)
        for values in rows:
            item = values[position]
            digest.update(
                b"\0" + (np.asarray(item).tobytes() if values.dtype != object else str(item).encode())
            )
        digests.append(digest.digest())
    return digests


def architecture_fingerprint(model: nn.Module) -> str:
    """A hash of what a model is made of, whatever its weights: modules, settings that they print, shapes.

    A change of the code of `forward` that shows in neither is not seen.
    """
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}\n{model!r}".encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}".encode())
    return digest.hexdigest()[:20]
