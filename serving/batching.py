"""What `--enable_batching` makes of a request: the real server's batching session, one request a batch.

Follows tensorflow/serving r2.11, batching/batching_session.cc, and the batch scheduler of TensorFlow 2.11.
Joining is along dimension 0 of every input and output, so `serving_default`, whose one input is the vector
itself, fails, and so does every signature with a scalar. There two requests that meet in one batch may fail
in other words than each alone; here each is alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from serving.handles import Servable
from serving.protocol import RequestError, Tensor


@dataclass(frozen=True)
class Batching:
    """Of --batching_parameters_file, what decides an answer; the defaults are the scheduler's."""

    max_batch_size: int = 1000
    allowed_batch_sizes: tuple[int, ...] = ()


def run_batched(
    servable: Servable, signature_name: str, inputs: Mapping[str, Tensor], batching: Batching
) -> dict[str, Tensor]:
    """Answer one request as a batching session does.

    Raises:
        RequestError: in the session's words, or in an op's.
    """
    size = _size(inputs)
    if size > batching.max_batch_size:
        raise RequestError(
            "INVALID_ARGUMENT",
            f"Task size {size} is larger than maximum input batch size {batching.max_batch_size}",
        )
    padded = min((allowed for allowed in batching.allowed_batch_sizes if allowed >= size), default=size)
    if padded > size > 0:
        inputs = {name: _pad(tensor, padded) for name, tensor in inputs.items()}
    outputs = servable.run(signature_name, inputs)
    for tensor in outputs.values():
        if not tensor.shape:
            raise RequestError("FAILED_PRECONDITION", "Batched output tensor has 0 dimensions")
        if tensor.shape[0] != padded:
            raise RequestError(
                "FAILED_PRECONDITION",
                "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes of "
                "the input tensors",
            )
    return {name: _first(tensor, size) for name, tensor in outputs.items()}


def _size(inputs: Mapping[str, Tensor]) -> int:
    """Dimension 0, which all inputs must share. There the order of the checks is that of a hash map."""
    if any(not tensor.shape for tensor in inputs.values()):
        raise RequestError(
            "INVALID_ARGUMENT", "Batching Run() input tensors must have at least one dimension"
        )
    sizes = {tensor.shape[0] for tensor in inputs.values()}
    if len(sizes) > 1:
        raise RequestError(
            "INVALID_ARGUMENT", "Batching Run() input tensors must have equal 0th-dimension size"
        )
    return sizes.pop()


def _pad(tensor: Tensor, size: int) -> Tensor:
    """The first row again, until there are `size` rows."""
    rows = _rows(tensor)
    rows = np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])
    return Tensor(tensor.dtype, (size, *tensor.shape[1:]), rows.ravel())


def _first(tensor: Tensor, size: int) -> Tensor:
    if tensor.shape[0] == size:
        return tensor
    return Tensor(tensor.dtype, (size, *tensor.shape[1:]), _rows(tensor)[:size].ravel())


def _rows(tensor: Tensor) -> np.ndarray:
    values = np.asarray(tensor.values, object if tensor.dtype == "DT_STRING" else None)
    return values.reshape(tensor.shape)
