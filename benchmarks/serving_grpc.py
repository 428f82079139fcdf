"""gRPC's load in benchmarks/serving.py: one process of several, asyncio, a connection a client.

    python benchmarks/serving_grpc.py PORT MESSAGES.npy LATENCIES.npy PLAN

Python's own client costs about as much as the server: what this measures is a lower bound of the server. Each
client waits for its answer before it asks again. LATENCIES.npy gets the milliseconds of each call; the
number of failed calls is said on one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import grpc
import numpy as np

METHOD = "/tensorflow.serving.PredictionService/Predict"
# Without it all of a process's channels to one address would share a connection.
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


def main(port: str, messages: str, latencies: str, plan: str) -> None:
    bodies = [row.tobytes() for row in np.load(messages)]
    took, n_failed = asyncio.run(load(port, bodies, **json.loads(plan)))
    np.save(latencies, np.array(took, np.float64) * 1e3)
    print(json.dumps({"failed": n_failed}))


async def load(
    port: str, bodies: list[bytes], clients: int, first: int, start: float, end: float
) -> tuple[list[float], int]:
    """Seconds of each call between `start` and `end` (time.monotonic), and how many calls failed.

    Args:
        first: this process's first client: no two ask the same at the same time.
    """
    took: list[float] = []
    failed = [0]

    async def ask(number: int) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", OPTIONS) as channel:
            predict, at = channel.unary_unary(METHOD), number * 997
            await asyncio.wait_for(channel.channel_ready(), 60)
            await asyncio.sleep(start - time.monotonic())
            while (asked := time.monotonic()) < end:
                try:
                    await predict(bodies[at % len(bodies)])
                except grpc.RpcError:
                    failed[0] += 1
                at += 1
                took.append(time.monotonic() - asked)

    await asyncio.gather(*(ask(first + number) for number in range(clients)))
    return took, failed[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
