"""Benchmark of search for people: text in and documents out, the encoder alone, titles as one types.

    python benchmarks/gateway.py                                 all three, about ten minutes on two cores
    python benchmarks/gateway.py --parts a --clients 1 8 --rounds 1 --seconds 2      to try it

a. The gateway under wrk's keep-alive connections, each with one request at a time and another text each time:
   in one process over the version's rows, and beside an index server over REST; each as it is, which encodes
   and searches together what comes together, and made to take every text by itself.
b. `python -m serving encoder` under hey, for texts of so many tokens and two sizes of encoder. hey knows one
   body, and the encoder computes equal texts of a batch once: so the server exchanges each one's first word.
c. Titles found key by key among made ones, beside peers (gateway_typing.py).

Encoders run without their cache of vectors, so that every text is computed. All gateways of part a are up at
once, those that are not asked are idle, and they take turns: the median round counts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when it is run as a file

from benchmarks import gateway_tables, gateway_typing
from benchmarks import machine as machine_
from benchmarks.serving import (
    WARM_SECONDS,
    FailedError,
    by_wrk,
    cpu_seconds,
    environment,
    free_port,
    rss_anon,
    running,
    save,
    say,
)
from pipeline.errors import InputError, PipelineError

HERE = Path(__file__).parent
ROOT = HERE.resolve().parent
BASE = Path("work/demo/models/index")
LIBRARIES = ("torch", "sentence-transformers", "fastapi", "uvicorn", "aiohttp", "polars", "numpy")
K = 10
N_WORDS = (3, 8)  # of a query
N_CHECKED = 50  # queries whose answers are compared before anything is timed
LEAST_SHARED = 0.7  # of ten documents, between an exact search and an index at any recall that is published
LENGTHS = [8, 16, 32, 64, 128, 256, 512]
HEY_REQUESTS, HEY_CLIENTS = 10_000, 256
HEY_TRIED = 16  # clients, to learn how many requests take how long
N_FIRST_WORDS = 2000  # a batch holds fewer texts
TOKENS_APART = 1  # of a batch: fewer than any text has, so that it is one text
PARTS = ("a", "b", "c")
EXAMPLES = """examples:
  python benchmarks/gateway.py --json work/bench/gateway.json --markdown gateway.md --plot gateway.png
  python benchmarks/gateway.py --parts a --device cuda
  python benchmarks/gateway.py --parts c --rows 100000

exit codes: 0 done, 1 a server failed, 2 bad arguments or input
"""

Entry = dict[str, Any]


@dataclass(frozen=True)
class System:
    """A gateway: where it searches, and whether what comes together is computed together."""

    title: str
    in_process: bool
    joined: bool


SYSTEMS = {
    "rows-apart": System("one process, one by one", True, False),
    "rows": System("one process, together", True, True),
    "served-apart": System("index server, one by one", False, False),
    "served": System("index server, together", False, True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the return value is the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["task"]:
        return TASKS[given[1]](*given[2:]) or 0
    options = parsed(given)
    try:
        results = benchmark(options)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(gateway_tables.report(results, "simple"))
    for file, write in ((options.markdown, _write_markdown), (options.plot, gateway_tables.draw)):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(results, file)
    return 0


def _write_markdown(results: Entry, file: Path) -> None:
    file.write_text(gateway_tables.report(results, "pipe") + "\n", encoding="utf-8")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model_base_path",
        type=Path,
        default=BASE,
        metavar="DIR",
        help=f"a published version; default {BASE}",
    )
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help="of a, b, c; default all",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of every encoder; default cpu")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME",
        help=f"of part a, default all: {', '.join(SYSTEMS)}")  # fmt: skip
    add("--clients", type=int, nargs="+", default=[1, 8, 64, 256], metavar="N", help="default 1 8 64 256")
    add("--seconds", type=float, default=4, metavar="S", help="of a measurement, default 4")
    add("--rounds", type=int, default=3, metavar="N", help="of part a, default 3")
    add("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="tokens of part b's text, the "
        "model's own included; default 8 16 ... 512")  # fmt: skip
    add("--requests", type=int, default=HEY_REQUESTS, metavar="N", help="of hey, default 10,000")
    add("--hey-seconds", type=float, default=30, metavar="S", help="fewer requests where they would take "
        "longer; default 30")  # fmt: skip
    add("--hey-clients", type=int, default=HEY_CLIENTS, metavar="N", help="default 256")
    add("--rows", type=int, default=1_500_000, metavar="N", help="made titles of part c, default 1,500,000")
    add("--typed", type=int, default=1000, metavar="N", help="titles that are typed, default 1,000")
    add("--peers-one-in", type=int, default=25, metavar="N", help="peers are asked at one key in so many; "
        "default 25")  # fmt: skip
    add("--work", type=Path, default=Path("work/bench/gateway"), metavar="DIR", help="for what is made")
    add("--json", type=Path, metavar="FILE", help="every round's figures")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    add("--plot", type=Path, metavar="FILE", help="PNG or SVG, by its ending")
    options = parser.parse_args(arguments)
    counts = ("rounds", "requests", "hey_clients", "rows", "typed", "peers_one_in", "clients", "lengths")
    for name in (*counts, "seconds", "hey_seconds"):
        values = getattr(options, name)
        least = 1 if name in counts else 1e-9
        for value in values if isinstance(values, list) else [values]:
            if value < least:
                wanted = "1 or more" if name in counts else "more than 0"
                parser.error(f"--{name.replace('_', '-')} is {value}, wanted {wanted}")
    return options


def benchmark(options: argparse.Namespace) -> Entry:
    """Measure the parts that were asked for, one after the other."""
    for part, tool in (("a", "wrk"), ("b", "hey")):
        if part in options.parts and not shutil.which(tool):
            raise InputError(f"{tool} is not on the PATH: apt-get install {tool}")
    version = newest(options.model_base_path)
    documents = read_documents(version)
    options.work.mkdir(parents=True, exist_ok=True)
    results: Entry = {"machine": machine_.describe(*LIBRARIES), "run": about(options, documents)}
    for part, measure in (("a", measure_gateways), ("b", measure_encoders), ("c", measure_typing)):
        if part in options.parts:
            results[part] = measure(options, version, documents)
            save(results, options.json)
    return results


def about(options: argparse.Namespace, documents: Sequence[str]) -> Entry:
    """What the run is, beside what it measures."""
    asked = ("device", "clients", "seconds", "rounds", "requests", "hey_seconds", "hey_clients")
    return {
        "documents": len(documents),
        "cores": len(os.sched_getaffinity(0)),
        **{name: getattr(options, name) for name in asked},
    }


# --- The version and its texts -------------------------------------------------------------------------


def newest(base: Path) -> Path:
    """The newest published version's folder.

    Raises:
        InputError: there is none.
    """
    versions = [path for path in base.glob("[0-9]*") if path.name.isdecimal()]
    if not versions:
        raise InputError(f"{base} holds no version: make demo publishes one, or give --model_base_path")
    return max(versions, key=lambda path: int(path.name))


def read_documents(version: Path) -> list[str]:
    """The documents' texts."""
    import pyarrow.parquet as pq

    file = version / "assets.extra" / "documents.parquet"
    texts: list[str | None] = pq.read_table(file, columns=["text"])["text"].to_pylist()
    return [text or "" for text in texts]


def encoder_of(version: Path) -> Path:
    manifest = json.loads((version / "assets.extra" / "manifest.json").read_text(encoding="utf-8"))
    return version.parents[2] / "encoders" / manifest["encoder_sha256"]


def queries_of(documents: Sequence[str]) -> list[str]:
    """Some words in a row of each document, different ones each: what somebody might type."""
    rng = np.random.default_rng(9)
    found = []
    for text in documents:
        words = re.findall(r"[^\W_]+", text)
        n = int(rng.integers(N_WORDS[0], N_WORDS[1] + 1))
        at = int(rng.integers(max(1, len(words) - n + 1)))
        found.append(" ".join(words[at : at + n]))
    return [text for text in dict.fromkeys(found) if text]


def with_rows(version: Path, work: Path) -> Path:
    """The base path of the version with rows.npy: itself, or a copy in `work` where it was published without.

    Raises:
        FailedError: the rows could not be made.
    """
    if (version / "assets.extra" / "rows.npy").exists():
        return version.parent
    copy = work / "with-rows" / "models" / version.parent.name / version.name
    rows = copy / "assets.extra" / "rows.npy"
    if not rows.exists():
        say(f"version {version.name} has no rows.npy: encoding its documents, once")
        shutil.rmtree(work / "with-rows", ignore_errors=True)
        shutil.copytree(version / "assets.extra", copy / "assets.extra")
        encoders = work / "with-rows" / "encoders"
        encoders.symlink_to(version.parents[2].resolve() / "encoders")
        task("rows", encoder_of(version), version, rows)
    return copy.parent


def task(name: str, *arguments: Any) -> None:
    """Run one of TASKS in a process of its own, which takes PyTorch with it when it ends."""
    command = [sys.executable, str(HERE / "gateway.py"), "task", name, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise FailedError(f"task {name} failed: {last[-1].strip()}")


def write_rows(encoder: str, version: str, out: str) -> None:
    """Task `rows`: the documents' vectors, as the stage publish writes them."""
    from pipeline.encoder import Encoder

    texts = read_documents(Path(version))
    partial_file = Path(out).with_name("partial.npy")
    np.save(partial_file, Encoder.open(Path(encoder)).documents(texts))
    partial_file.replace(out)


# --- Servers -------------------------------------------------------------------------------------------


def serve(plan: str) -> int:
    """Task `serve`: `python -m serving` without a cache of vectors, and with each text by itself if wanted.

    Args:
        plan: JSON of `arguments` for it, `joined`, `device`, and `words` to begin texts with, if any.
    """
    wanted = json.loads(plan)
    if wanted["device"] == "cuda":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    from serving import encoding, index_backends
    from serving.__main__ import main as serving_main

    opened = encoding.LocalEncoding.open.__func__
    encoding.LocalEncoding.open = classmethod(
        lambda cls, folder, **given: opened(cls, folder, **given | {"cache_bytes": 0})
    )
    if not wanted["joined"]:
        encoding.BATCH_TOKENS = dict.fromkeys(encoding.BATCH_TOKENS, TOKENS_APART)
        index_backends.MAX_JOINED, index_backends.MAX_FLYING = 1, 10_000
    if wanted["words"]:
        encoding.LocalEncoding.encoded = with_first_words(encoding.LocalEncoding.encoded, wanted["words"])
    return serving_main(wanted["arguments"])


def with_first_words(encoded: Any, words: Sequence[str]) -> Any:
    """`encoded`, each text with the next of `words` instead of its first one."""
    numbers = itertools.count()

    async def changed(self: Any, texts: Sequence[str], *given: Any, **named: Any) -> Any:
        others = [f"{words[next(numbers) % len(words)]} {text.partition(' ')[2]}" for text in texts]
        return await encoded(self, others, *given, **named)

    return changed


TASKS: dict[str, Callable[..., int | None]] = {"rows": write_rows, "serve": serve}


@dataclass(frozen=True)
class Asked:
    """A server that wrk asks; the names are those that `by_wrk` reads."""

    pid: int
    port: int
    path: str = "/search"
    bodies: str = "queries.jsonl"


def answers(port: int, path: str = "/health") -> bool:
    """Whether GET is answered with 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def ours(
    arguments: Sequence[str], port: int, device: str, joined: bool = True, words: Sequence[str] = ()
) -> Iterator[int]:
    """A gateway or an encoder server, ready; its process id."""
    plan = {
        "arguments": [*arguments, f"--port={port}", f"--device={device}"],
        "device": device, "joined": joined, "words": list(words),
    }  # fmt: skip
    command = [str(HERE / "gateway.py"), "task", "serve", json.dumps(plan)]
    with running(command, lambda: answers(port)) as pid:
        yield pid


@contextlib.contextmanager
def index_server(base: Path, joined: bool) -> Iterator[int]:
    """This project's index server, ready; its port. Apart, it joins no searches either."""
    port = free_port()
    command = ["-m", "serving", f"--rest_api_port={port}", "--port=0", "--model_name=index",
               f"--model_base_path={base.absolute()}", f"--coalesce={str(joined).lower()}"]  # fmt: skip
    with running(command, lambda: answers(port, "/v1/models/index/metadata")):
        yield port


@contextlib.contextmanager
def gateway(system: System, version: Path, options: argparse.Namespace) -> Iterator[Asked]:
    """A gateway of part a, ready."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        if system.in_process:
            base, where = with_rows(version, options.work), ["--in_process"]
        else:
            base = version.parent
            index_port = stack.enter_context(index_server(base, system.joined))
            where = [f"--index_url=http://127.0.0.1:{index_port}"]
        arguments = ["gateway", f"--model_base_path={base.absolute()}", "--no_hybrid", *where]
        yield Asked(stack.enter_context(ours(arguments, port, options.device, system.joined)), port)


# --- a. Text in, documents out -------------------------------------------------------------------------


def measure_gateways(options: argparse.Namespace, version: Path, documents: Sequence[str]) -> Entry:
    """Start all, compare their answers, measure in turn."""
    queries = queries_of(documents)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bodies = [json.dumps({"query": query, "k": K}) for query in queries]
        (place / "queries.jsonl").write_text("\n".join(bodies) + "\n", encoding="utf-8")
        servers = {
            name: stack.enter_context(gateway(SYSTEMS[name], version, options)) for name in options.systems
        }
        found: Entry = {
            "queries": len(queries),
            "titles": {name: SYSTEMS[name].title for name in servers},
            "shared": shared(servers, bodies[:N_CHECKED]),
            "rounds": [],
        }
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            for clients in options.clients:
                found["rounds"] += [
                    one_measurement(name, server, clients, options.seconds, place)
                    for name, server in servers.items()
                ]
        found["rss_anon"] = {name: rss_anon(server.pid) for name, server in servers.items()}
    return found


def one_measurement(name: str, server: Any, clients: int, seconds: float, place: Path) -> Entry:
    """A warm-up and one measurement."""
    by_wrk(server, clients, WARM_SECONDS, place)
    before = cpu_seconds(server.pid)
    figures = by_wrk(server, clients, seconds, place)
    figures["cpu_us"] = (cpu_seconds(server.pid) - before) / max(figures["requests"], 1) * 1e6
    say(
        f"{SYSTEMS[name].title}, {clients} clients: {figures['rate']:,.0f} requests/s, "
        f"p50 {figures['p50']:.1f} ms, p99 {figures['p99']:.1f} ms, {figures['errors']} errors"
    )
    return {"system": name, "clients": clients, **figures}


def shared(servers: dict[str, Asked], bodies: Sequence[str]) -> dict[str, float]:
    """Share of the first system's documents that each one finds too, 0 to 1.

    Raises:
        FailedError: too few: somebody answers wrongly.
    """
    found = {name: [_asked(server.port, body) for body in bodies] for name, server in servers.items()}
    first = next(iter(found.values()))
    shares = {}
    for name, lists in found.items():
        both = [len(set(ours) & set(theirs)) for ours, theirs in zip(lists, first, strict=True)]
        shares[name] = sum(both) / max(1, sum(map(len, first)))
        if shares[name] < LEAST_SHARED:
            raise FailedError(
                f"{SYSTEMS[name].title} finds {shares[name]:.2f} of what {SYSTEMS[next(iter(found))].title} "
                f"does, wanted {LEAST_SHARED} at least: another version, or wrong answers"
            )
    return shares


def _asked(port: int, body: str) -> list[str]:
    """The documents of one answer."""
    url = f"http://127.0.0.1:{port}/search"
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [each["document_id"] for each in json.load(answer)["results"]]
    except OSError as error:
        raise FailedError(f"{url} answers {error} to {body}") from None


# --- b. The encoder alone ------------------------------------------------------------------------------


def measure_encoders(options: argparse.Namespace, version: Path, documents: Sequence[str]) -> Entry:
    """Both sizes, one after the other, at every length."""
    folder = options.work / "encoders" / encoder_of(version).name[:12]
    if not (folder / "sizes.json").exists():
        say("making the encoders of part b, once")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        task("sizes", encoder_of(version), folder)
    sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    measured = []
    for size in sizes:
        _refuse_too_long(options.lengths, size)
        tokenizer = folder / size["name"] / "tokenizer.json"
        words = one_token_words(tokenizer, documents)
        port = free_port()
        arguments = ["encoder", f"--model={folder / size['name']}", "--precision=float32"]
        with (
            ours(arguments, port, options.device, words=words),
            tempfile.TemporaryDirectory() as place,
        ):
            for length in options.lengths:
                body = Path(place) / "body.json"
                body.write_text(json.dumps({"inputs": text_of(length, tokenizer, words)}), encoding="utf-8")
                figures = by_hey(f"http://127.0.0.1:{port}/embed", body, options)
                measured.append({"size": size["name"], "length": length, **figures})
                say(f"{size['title']}, {length} tokens: {figures['rate']:,.0f} requests/s")
    return {"sizes": sizes, "measured": measured}


def _refuse_too_long(lengths: Sequence[int], size: Entry) -> None:
    if max(lengths) > size["max_tokens"]:
        raise InputError(
            f"--lengths {max(lengths)}: {size['title']} reads {size['max_tokens']} tokens at most"
        )


def write_sizes(encoder: str, out: str) -> None:
    """Task `sizes`: the encoder as it is and with each of its layers twice, both reading all they can."""
    import copy

    import torch
    from sentence_transformers import SentenceTransformer

    from pipeline.encoder import transformers_of

    sizes = []
    for name, times in (("once", 1), ("twice", 2)):
        model = SentenceTransformer(encoder, device="cpu")
        body: Any = transformers_of(model)[0].auto_model
        layers = [copy.deepcopy(layer) for layer in body.encoder.layer for _ in range(times)]
        body.encoder.layer = torch.nn.ModuleList(layers)
        body.config.num_hidden_layers = len(layers)
        model.max_seq_length = body.config.max_position_embeddings
        model.save(str(Path(out) / name))
        n_parameters = sum(each.numel() for each in body.parameters())
        title = f"{len(layers)} layers of {body.config.hidden_size}, {n_parameters / 1e6:.1f} M parameters"
        sizes.append({"name": name, "title": title, "max_tokens": model.max_seq_length})
    (Path(out) / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")


TASKS["sizes"] = write_sizes


def one_token_words(tokenizer: Path, documents: Sequence[str]) -> list[str]:
    """Words of the documents that are one token of the model's, at most N_FIRST_WORDS.

    Raises:
        InputError: there are none.
    """
    read, n_own = _tokenizer(tokenizer)
    words = dict.fromkeys(word for text in documents for word in re.findall(r"[^\W\d_]+", text))
    single = (word for word in words if len(read.encode(word).ids) == n_own + 1)
    found = list(itertools.islice(single, N_FIRST_WORDS))
    if not found:
        raise InputError(
            f"{tokenizer}: no word of the documents is one token; give another --model_base_path"
        )
    return found


def text_of(length: int, tokenizer: Path, words: Sequence[str]) -> str:
    """A text of exactly so many tokens, the model's own included, of `words` of one token each.

    Raises:
        InputError: the model adds as many tokens itself.
    """
    _, n_own = _tokenizer(tokenizer)
    if length <= n_own:
        raise InputError(f"--lengths {length}: the model adds {n_own} tokens itself; wanted more")
    return " ".join(words[n % len(words)] for n in range(length - n_own))


def _tokenizer(file: Path) -> tuple[Any, int]:
    """The tokenizer, which cuts nothing, and how many tokens it adds to every text."""
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(file))
    read.no_truncation()
    read.no_padding()
    return read, len(read.encode("").ids)


def by_hey(url: str, body: Path, options: argparse.Namespace) -> Entry:
    """Requests/s, average latency in ms, errors, and requests: fewer where they would take too long.

    Raises:
        FailedError: hey itself failed.
    """
    clients = options.hey_clients
    few = min(clients, HEY_TRIED)
    _hey(url, body, few, few)
    tried = _hey(url, body, 2 * few, few)  # warm now
    n_possible = int(tried["rate"] * options.hey_seconds) // clients * clients
    return _hey(url, body, max(clients, min(options.requests, n_possible)), clients)


def _hey(url: str, body: Path, n: int, clients: int) -> Entry:
    command = ["hey", "-n", str(n), "-c", str(clients), "-t", "300", "-m", "POST",
               "-T", "application/json", "-D", str(body), url]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or "Requests/sec" not in done.stdout:
        raise FailedError(f"hey failed: {(done.stderr or done.stdout or 'it said nothing').strip()[-200:]}")
    return read_hey(done.stdout)


def read_hey(said: str) -> Entry:
    """What hey printed, as a measurement; every answer but 200, and none at all, is an error."""
    by_status = {int(status): int(n) for status, n in re.findall(r"\[(\d{3})\]\s+(\d+) responses", said)}
    n_none = sum(
        int(n) for n in re.findall(r"^\s*\[(\d+)\]\s+\D", said.partition("Error distribution:")[2], re.M)
    )
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    average = re.search(r"Average:\s+([\d.]+) secs", said)
    return {
        "requests": sum(by_status.values()) + n_none,
        "rate": float(rate[1]) if rate else 0.0,
        "average": 1000 * float(average[1]) if average else 0.0,
        "errors": n_none + sum(n for status, n in by_status.items() if status != 200),
    }


# --- c. As one types -----------------------------------------------------------------------------------


def measure_typing(options: argparse.Namespace, version: Path, documents: Sequence[str]) -> Entry:
    say(f"titles: {options.rows:,} are made, then each system is built and asked")
    measure = partial(gateway_typing.measure, documents, options.rows, options.typed, options.peers_one_in)
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        return measure(Path(place))


if __name__ == "__main__":
    sys.exit(main())
