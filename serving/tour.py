"""A tour of a published index: starts the local server, asks what the README's curl lines ask, stops it."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError
from serving.ask import ask, encode, inputs_of, served_version
from serving.client import Client, body_of, call_body
from serving.errors import ServingError

START_SECONDS = 120.0  # TensorFlow and the index must load; large ones take most of it
STOP_SECONDS = 10.0
SHOWN_NUMBERS = 3  # of a query vector


def tour(model_base_path: Path, model_name: str, text: str, k: int | None) -> None:
    """Ask a server of our own for status, metadata, a vector's neighbours and a text's documents.

    Raises:
        ArtifactError: no version is published there.
        ServingError: the server does not start, or refuses.
    """
    if not any(path.name.isdecimal() for path in model_base_path.glob("*")):
        raise ArtifactError(f"{model_base_path} holds no version: publish one first")
    with running(model_base_path, model_name) as client:
        address = f"{client.url}/v1/models/{model_name}"
        _show(f"curl {address}", {"model_version_status": client.status()})
        metadata = _without_init(client.metadata())
        _show(f"curl {address}/metadata", metadata)
        version = served_version(client, model_base_path)
        vector = encode(version, text)
        print(f"\n# query.json is {_shortened(body_of(vector))}, the vector of {text!r}")
        found = client.predict(vector)
        outputs = {"output_1": found.scores, "output_2": found.rows}
        _show(f"curl -d @query.json -X POST {address}:predict", {"outputs": outputs})
        if "search" in _signatures(metadata):
            inputs = inputs_of(version, "search", vector, k)
            print(f"\n# search.json is {_shortened(call_body('search', inputs))}")
            found_ids = {"outputs": client.call("search", inputs)}
            _show(f"curl -d @search.json -X POST {address}:predict", found_ids)
        print(f'\n$ python -m serving ask "{text}"' + (f" -k {k}" if k else ""))
        print(ask(client, model_base_path, text, k), flush=True)


@contextmanager
def running(model_base_path: Path, model_name: str) -> Iterator[Client]:
    """A server on a free port, ready, and a client for it; the server ends with the block.

    Raises:
        ServingError: it ended before it was ready, or did not become ready in time.
    """
    port = _free_port()
    flags = [
        f"--rest_api_port={port}",
        "--port=0",  # no gRPC: its default port may be another server's
        f"--model_name={model_name}",
        f"--model_base_path={model_base_path.absolute()}",
        "--max_num_load_retries=0",  # what fails now fails in a minute
    ]
    server = subprocess.Popen([sys.executable, "-m", "serving", *flags], stderr=subprocess.PIPE, text=True)
    try:
        with Client(f"http://localhost:{port}", model_name) as client:
            try:
                client.wait_until_ready(START_SECONDS)
            except ServingError as error:
                server.kill()
                raise ServingError(f"{error}; the server said: {_last_line(server)}") from None
            yield client
    finally:
        server.terminate()
        try:
            server.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _last_line(server: subprocess.Popen) -> str:
    lines = [line for line in server.communicate()[1].splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def _signatures(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata["metadata"]["signature_def"]["signature_def"]


def _without_init(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata document without the signature that nobody can call."""
    kept = {n: s for n, s in _signatures(metadata).items() if n != "__saved_model_init_op"}
    return metadata | {"metadata": {"signature_def": {"signature_def": kept}}}


def _shortened(body: str) -> str:
    """A request with the first numbers of its one vector."""

    def shorten(vector: re.Match[str]) -> str:
        numbers = vector[1].split(", ")
        return f"[{', '.join(numbers[:SHOWN_NUMBERS])}, ... {len(numbers)} numbers]"

    return re.sub(r"\[([^][]{100,})\]", shorten, body)


def _show(command: str, answer: dict[str, Any]) -> None:
    print(f"\n$ {command}\n{json.dumps(answer, ensure_ascii=False)}", flush=True)
