"""The peer in benchmarks/serving.py: FastAPI around a SavedModel of tfrs's ScaNN layer, as people write it.

    python benchmarks/serving_peer.py FOLDER PORT layer|signature threads|loop

Two choices differ from one tutorial to the next: the loaded layer is called, or its signature; the handler is
`def`, which FastAPI runs in a thread, or `async def`, which runs in the event loop. The benchmark times all
four and keeps the fastest. uvicorn takes uvloop and httptools, and logs no requests.
"""

import os
import sys

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import tensorflow as tf
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from scann.scann_ops.py import scann_ops  # noqa: F401  registers ScaNN's ops


class Query(BaseModel):
    vector: list[float]


class Found(BaseModel):
    scores: list[float]
    rows: list[int]


def make_app(folder: str, called: str, handler: str) -> FastAPI:
    app, index = FastAPI(), tf.saved_model.load(folder)

    def by_layer(query: Query) -> Found:
        scores, rows = index(tf.constant(query.vector))
        return Found(scores=scores.numpy().tolist(), rows=rows.numpy().tolist())

    def by_signature(query: Query) -> Found:
        found = index.signatures["serving_default"](input_1=tf.constant(query.vector))
        return Found(scores=found["output_1"].numpy().tolist(), rows=found["output_2"].numpy().tolist())

    search = {"layer": by_layer, "signature": by_signature}[called]

    async def in_the_loop(query: Query) -> Found:
        return search(query)

    app.post("/search")(in_the_loop if handler == "loop" else search)
    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1], *sys.argv[3:]), port=int(sys.argv[2]), log_level="warning")
