"""Which requests may be searched as one, how their inputs are joined, and how the answer is split again.

Plain NumPy. Only signatures that the index's own export writes are joined: of any other SavedModel nobody
knows whether its rows are independent of each other.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serving.protocol import DEFAULT_SIGNATURE, Signature, Tensor

BATCH_SIGNATURE = "serving_default_batch"  # several of serving_default's queries at once
SEVERAL_QUERIES = ("search", BATCH_SIGNATURE)

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]


class Join(Protocol):
    """How requests of one signature are searched as one."""

    def key(self, inputs: Inputs) -> Hashable | None:
        """Requests of equal keys may be searched together; None: this one goes alone."""

    def queries(self, requests: Sequence[Inputs]) -> np.ndarray:
        """float32 (n_queries, dim) of all requests, in their order."""

    def request(self, queries: np.ndarray, first: Inputs) -> tuple[str, Inputs]:
        """The signature and inputs that search all; `first` is any of the requests."""

    def split(self, outputs: Outputs, sizes: Sequence[int]) -> list[Outputs]:
        """Each request's own answer.

        Raises:
            ValueError: the answer has not a row a query.
        """


@dataclass(frozen=True)
class OneQueryEach:
    """`serving_default` requests, searched as one by `serving_default_batch`."""

    dim: int

    def key(self, inputs: Inputs) -> Hashable | None:
        query = inputs["input_1"]
        return () if query.shape == (self.dim,) and query.dtype == "DT_FLOAT" else None

    def queries(self, requests: Sequence[Inputs]) -> np.ndarray:
        flat = np.concatenate([inputs["input_1"].values for inputs in requests], dtype=np.float32)
        return flat.reshape(-1, self.dim)

    def request(self, queries: np.ndarray, first: Inputs) -> tuple[str, Inputs]:
        return BATCH_SIGNATURE, {"queries": Tensor("DT_FLOAT", queries.shape, queries.ravel())}

    def split(self, outputs: Outputs, sizes: Sequence[int]) -> list[Outputs]:
        scores, rows = (_matrix(outputs[name], len(sizes)) for name in ("scores", "rows"))
        ends = np.count_nonzero(rows >= 0, axis=1).tolist()  # the rows that are missing are the last ones
        return [
            {
                "output_1": Tensor("DT_FLOAT", (end,), scores[i, :end]),
                "output_2": Tensor("DT_INT32", (end,), rows[i, :end]),
            }
            for i, end in enumerate(ends)
        ]


@dataclass(frozen=True)
class SeveralQueries:
    """Requests of one signature with a matrix `queries` and equal scalars, joined along the queries."""

    signature_name: str
    dim: int
    scalars: tuple[str, ...]

    def key(self, inputs: Inputs) -> Hashable | None:
        queries = inputs["queries"]
        if queries.dtype != "DT_FLOAT" or len(queries.shape) != 2 or queries.shape[1] != self.dim:
            return None
        if not queries.shape[0] or any(inputs[name].shape for name in self.scalars):
            return None
        return tuple((inputs[name].dtype, inputs[name].values[0]) for name in self.scalars)

    def queries(self, requests: Sequence[Inputs]) -> np.ndarray:
        flat = np.concatenate([inputs["queries"].values for inputs in requests], dtype=np.float32)
        return flat.reshape(-1, self.dim)

    def request(self, queries: np.ndarray, first: Inputs) -> tuple[str, Inputs]:
        joined = {"queries": Tensor("DT_FLOAT", queries.shape, queries.ravel())}
        return self.signature_name, dict(first) | joined

    def split(self, outputs: Outputs, sizes: Sequence[int]) -> list[Outputs]:
        whole = {name: (tensor.dtype, _matrix(tensor, sum(sizes))) for name, tensor in outputs.items()}
        stops = np.cumsum(sizes).tolist()
        return [
            {name: _part(dtype, rows[stop - size : stop]) for name, (dtype, rows) in whole.items()}
            for size, stop in zip(sizes, stops, strict=True)
        ]


def join_of(signatures: Mapping[str, Signature], name: str) -> Join | None:
    """How requests of a signature are joined; None: one by one."""
    if name == DEFAULT_SIGNATURE and BATCH_SIGNATURE in signatures:
        dim = _dim(signatures[BATCH_SIGNATURE])
        return OneQueryEach(dim) if dim and _is_the_layers(signatures) else None
    if name in SEVERAL_QUERIES and name in signatures:
        signature = signatures[name]
        scalars = tuple(sorted(set(signature.inputs) - {"queries"}))
        if _dim(signature) and all(signature.inputs[scalar].shape == () for scalar in scalars):
            return SeveralQueries(name, _dim(signature), scalars)
    return None


def _is_the_layers(signatures: Mapping[str, Signature]) -> bool:
    """Whether both signatures have the names and types that this file joins and splits."""
    one, several = signatures[DEFAULT_SIGNATURE], signatures[BATCH_SIGNATURE]
    return (
        _types(one.inputs) == {"input_1": "DT_FLOAT"}
        and _types(one.outputs) == {"output_1": "DT_FLOAT", "output_2": "DT_INT32"}
        and _types(several.inputs) == {"queries": "DT_FLOAT"}
        and _types(several.outputs) == {"scores": "DT_FLOAT", "rows": "DT_INT32"}
    )


def _types(tensors: Mapping) -> dict[str, str]:
    return {name: info.dtype for name, info in tensors.items()}


def _dim(signature: Signature) -> int:
    """The width of `queries`, 0 where it is no matrix of known width."""
    info = signature.inputs.get("queries")
    shape = info.shape if info else None
    return shape[1] if shape and len(shape) == 2 and shape[1] > 0 else 0


def _matrix(tensor: Tensor, n_rows: int) -> np.ndarray:
    if len(tensor.shape) != 2 or tensor.shape[0] != n_rows:
        raise ValueError(f"an answer of shape {tensor.shape} for {n_rows} queries")
    return np.asarray(tensor.values).reshape(tensor.shape)


def _part(dtype: str, rows: np.ndarray) -> Tensor:
    return Tensor(dtype, rows.shape, rows.ravel())
