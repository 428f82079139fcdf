"""Rehearsal of outages: kills each server under load, starts it again, and shows what users saw.

    python benchmarks/gateway_rehearsal.py                       a minute and a half
    python benchmarks/gateway_rehearsal.py --rate 5 --steady 2 --down 2       to try it

An encoder server, an index server and a gateway that asks both run as processes of their own. People search
so often a second, each at his own time whether others are answered or not, and one types on the page: a
suggestion a key. SIGKILL meets the index server, the encoder server and the gateway in turn; each is away for
some seconds and is started again as it was. At the end the gateway gets a SIGTERM.

It fails where answers do not come back within --bound seconds of a restart, where an error is none of the
clear ones, where somebody waits longer than --longest, or where a search that was sent before the SIGTERM is
lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when it is run as a file

from benchmarks import machine as machine_
from benchmarks.gateway import BASE, ROOT, answers, newest, queries_of, read_documents
from benchmarks.serving import START_SECONDS, STOP_SECONDS, FailedError, environment, free_port, say
from pipeline.errors import PipelineError

LIBRARIES = ("torch", "tensorflow", "fastapi", "uvicorn", "aiohttp")
N_IN_A_ROW = 10  # searches answered after a restart: then it is over
KEY_SECONDS = 0.25  # between two keys of who types on the page
PATIENCE_SECONDS = 60.0  # of a client
IN_FLIGHT_SECONDS = 1.0  # before a SIGKILL of the gateway: what was sent then may be lost with it
NO_GATEWAY = 0  # instead of a status: no connection, or one that broke
# What a person can act on: who is away, and what to do or that it passes.
CLEAR = (
    r"^no index server answers at http\S+ \(.+\): start it with ",
    r"^the index server at http\S+ gave no answer in [\d.]+ s; is it overloaded\?$",
    r"^http\S+: the encoder server cannot be reached \(.+\); start it with ",
    r"^http\S+: no answer within [\d.]+ seconds: the encoder server is overloaded or hangs; see its log$",
    r"^not ready: ",
    r": ask again",
    r"ask again later$",
)
COLOURS = {"answered": "#009e73", "refused": "#e69f00", "no gateway": "#d55e00", "unclear": "#000000"}

Entry = dict[str, Any]


class Seen(NamedTuple):
    """What one person saw: sent and took in seconds from the beginning, status, and the error's line."""

    sent: float
    took: float
    status: int
    error: str
    is_search: bool

    @property
    def kind(self) -> str:
        """A key of COLOURS."""
        if self.status == 200:
            return "answered"
        if self.status == NO_GATEWAY:
            return "no gateway"
        return "refused" if is_clear(self.status, self.error) else "unclear"


class Event(NamedTuple):
    """What was done to a server, at which second; `back` where answers came again, seconds after a start."""

    second: float
    what: str
    back: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse; the return value is the exit code: 1 where something went wrong for users."""
    options = parsed(arguments)
    try:
        results = asyncio.run(rehearse(options))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report(results, "simple"))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(report(results, "pipe") + "\n", encoding="utf-8")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(results, options.plot)
    return 1 if results["faults"] else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--model_base_path",
        type=Path,
        default=BASE,
        metavar="DIR",
        help=f"a published version; default {BASE}",
    )
    add("--rate", type=float, default=20, metavar="N", help="searches a second, default 20")
    add("--steady", type=float, default=5, metavar="S", help="seconds of rest before each kill, default 5")
    add("--down", type=float, default=5, metavar="S", help="seconds that a server is away, default 5")
    add("--bound", type=float, default=60, metavar="S", help="for answers to come back, default 60")
    add("--longest", type=float, default=10, metavar="S", help="that anybody may wait, default 10")
    add("--json", type=Path, metavar="FILE", help="every request")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    add("--plot", type=Path, metavar="FILE", help="PNG or SVG, by its ending")
    options = parser.parse_args(arguments)
    for name in ("rate", "steady", "down", "bound", "longest"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} is {getattr(options, name)}, wanted more than 0")
    return options


def is_clear(status: int, error: str) -> bool:
    """Whether an error says, in one line and with a status to come back after, what a person can do."""
    one_line = error == " ".join(error.split()) and 0 < len(error) <= 500
    return status in (429, 503) and one_line and any(re.search(pattern, error) for pattern in CLEAR)


# --- Servers -------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A server that is killed and started again, always at the same port."""

    name: str
    arguments: list[str]
    port: int
    ready_path: str
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "serving", *self.arguments]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)

    def wait_until_ready(self) -> None:
        """Raises FailedError: it ended, or was not ready in time."""
        end = time.monotonic() + START_SECONDS
        while not answers(self.port, self.ready_path):
            if self.process is None or self.process.poll() is not None or time.monotonic() > end:
                last = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise FailedError(f"the {self.name} did not start: {last[0]}")
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def stop(self) -> int | None:
        """Its exit code; killed where it does not end by itself."""
        if self.process is None:
            return None
        self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


@contextlib.contextmanager
def parts_of(base: Path, place: Path) -> Iterator[dict[str, Part]]:
    """All three, ready."""
    base = base.absolute()
    encoder, index, gateway = free_port(), free_port(), free_port()
    where = f"--model_base_path={base}"
    parts = {
        "index server": Part(
            "index server", [f"--rest_api_port={index}", "--port=0", "--model_name=index", where], index,
            "/v1/models/index/metadata", place / "index.log",
        ),
        "encoder server": Part(
            "encoder server", ["encoder", f"--port={encoder}", "--device=cpu", where], encoder, "/health",
            place / "encoder.log",
        ),
        "gateway": Part(
            "gateway",
            ["gateway", f"--port={gateway}", where, f"--index_url=http://127.0.0.1:{index}",
             f"--encoder_url=http://127.0.0.1:{encoder}"], gateway, "/health", place / "gateway.log",
        ),
    }  # fmt: skip
    try:
        for part in parts.values():
            part.start()
        for part in parts.values():
            part.wait_until_ready()
        yield parts
    finally:
        for part in reversed(list(parts.values())):
            part.stop()


# --- People --------------------------------------------------------------------------------------------


class People:
    """Those who ask the gateway until told to stop, and what they saw."""

    def __init__(self, url: str, queries: Sequence[str], rate: float) -> None:
        self.url, self.queries, self.rate = url, queries, rate
        self.seen: list[Seen] = []
        self._began = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over = False

    def now(self) -> float:
        """Seconds from the beginning."""
        return time.monotonic() - self._began

    async def ask(self) -> None:
        """Send searches at their times, answered or not, and type on the page, until the last answer."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            typing = asyncio.create_task(self._type(session))
            number = 0
            while not self._is_over:
                query = self.queries[number % len(self.queries)]
                task = asyncio.create_task(self._one(session.post, "/search", json={"query": query}))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                number += 1
                await asyncio.sleep(max(0.0, number / self.rate - self.now()))
            await asyncio.gather(typing, *self._tasks)

    def stop(self) -> None:
        self._is_over = True

    async def _type(self, session: Any) -> None:
        """As the page does: one request a key, and each waits for nobody but the one before."""
        for query in self.queries:
            for end in range(1, min(len(query), 12) + 1):
                if self._is_over:
                    return
                await self._one(session.get, "/suggest", params={"q": query[:end]})
                await asyncio.sleep(KEY_SECONDS)

    async def _one(self, method: Any, path: str, **asked: Any) -> None:
        import aiohttp

        sent = self.now()
        try:
            async with method(self.url + path, **asked) as answer:
                body = await answer.read()
                status, error = answer.status, "" if answer.status == 200 else said(body)
        except TimeoutError:
            status, error = -1, f"no answer within {PATIENCE_SECONDS:g} s"
        except aiohttp.ClientError as fault:
            status, error = NO_GATEWAY, type(fault).__name__
        self.seen.append(Seen(sent, self.now() - sent, status, error, path == "/search"))

    async def until_answered(self, since: float, bound: float) -> float | None:
        """Seconds after `since` of the first of N_IN_A_ROW searches that were answered; None: not in `bound`.

        Searches count by the time at which they were sent.
        """
        while self.now() < since + bound:
            later = sorted(one for one in self.seen if one.is_search and one.sent >= since)
            if (first := back_at(later)) is not None:
                return first - since
            await asyncio.sleep(0.1)
        return None


def said(body: bytes) -> str:
    """The line of an error's body; of what is none, its beginning."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"no JSON with an error: {body[:100]!r}"


def back_at(searches: Sequence[Seen]) -> float | None:
    """When the first of the last unbroken run of answered ones was sent, where it is long enough."""
    run: list[Seen] = []
    for one in searches:
        run = [*run, one] if one.status == 200 else []
    return run[0].sent if len(run) >= N_IN_A_ROW else None


# --- The rehearsal -------------------------------------------------------------------------------------


async def rehearse(options: argparse.Namespace) -> Entry:
    """Start all, kill in turn, end; `seen`, `events`, `faults` and what the run was."""
    version = newest(options.model_base_path)
    queries = queries_of(read_documents(version))
    machine = machine_.describe(*LIBRARIES)
    with tempfile.TemporaryDirectory() as place:
        say("starting an index server, an encoder server and a gateway")
        with parts_of(options.model_base_path, Path(place)) as parts:
            people = People(f"http://127.0.0.1:{parts['gateway'].port}", queries, options.rate)
            asking = asyncio.create_task(people.ask())
            events: list[Event] = []
            for part in parts.values():
                events += await outage(part, people, options)
            await asyncio.sleep(options.steady)
            events.append(Event(people.now(), "SIGTERM to the gateway"))
            say(events[-1].what)
            parts["gateway"].signal(signal.SIGTERM)
            code = await asyncio.to_thread(parts["gateway"].stop)
            await asyncio.sleep(1)
            people.stop()
            await asking
    seen = sorted(people.seen)
    return {
        "machine": machine,
        "run": {name: getattr(options, name) for name in ("rate", "steady", "down", "bound", "longest")},
        "events": events,
        "seen": seen,
        "faults": faults(seen, events, options.longest, code),
    }


async def outage(part: Part, people: People, options: argparse.Namespace) -> list[Event]:
    """SIGKILL, some seconds without, a start, and the wait until answers come again."""
    await asyncio.sleep(options.steady)
    events = [Event(people.now(), f"SIGKILL to the {part.name}")]
    say(events[0].what)
    part.signal(signal.SIGKILL)
    await asyncio.sleep(options.down)
    started = people.now()
    part.start()
    back = await people.until_answered(started, options.bound)
    say(f"{part.name} started again: " + ("no answers" if back is None else f"answers after {back:.1f} s"))
    return [*events, Event(started, f"{part.name} started again", back)]


def faults(seen: Sequence[Seen], events: Sequence[Event], longest: float, code: int | None) -> list[str]:
    """What must not be: one line each; [] where all went well."""
    found = [
        f"{event.what}, and answers did not come back"
        for event in events
        if event.what.endswith("started again") and event.back is None
    ]
    unclear = Counter(f"{one.status} {one.error}" for one in seen if one.kind == "unclear")
    found += [f"no clear error, {n} times: {text}" for text, n in unclear.items()]
    slowest = max(seen, key=lambda one: one.took)
    if slowest.took > longest:
        found.append(f"somebody waited {slowest.took:.1f} s at second {slowest.sent:.0f}, wanted {longest:g}")
    away = [one for one in seen if one.kind == "no gateway" and not _is_gateway_away(one.sent, events)]
    if away:
        found.append(f"{len(away)} requests found no gateway while it ran, the first at {away[0].sent:.1f} s")
    if code != 0:
        found.append(f"the gateway ended with {code} after SIGTERM, wanted 0")
    return found


def _is_gateway_away(second: float, events: Sequence[Event]) -> bool:
    """Whether a request of that second may be without an answer: it met the kill, or the time after it."""
    killed = next((e.second for e in events if e.what == "SIGKILL to the gateway"), float("inf"))
    again = next((e for e in events if e.what == "gateway started again"), None)
    ended = next((e.second for e in events if e.what.startswith("SIGTERM")), float("inf"))
    end = again.second + again.back if again and again.back is not None else ended
    return killed - IN_FLIGHT_SECONDS <= second <= end or second >= ended


# --- The tables and the picture ------------------------------------------------------------------------


def report(results: Entry, form: str) -> str:
    """The timeline, the errors that users read, and the notes; `form` is one of tabulate's."""
    parts = [timeline_table(results, form), errors_table(results, form), "\n".join(notes(results))]
    return "\n\n".join(part for part in parts if part)


def timeline(seen: Sequence[Seen], events: Sequence[Event]) -> list[Entry]:
    """A row a second in which anything was sent: counts by kind, of suggestions, p50 and longest in ms."""
    rows = []
    for second in sorted({int(one.sent) for one in seen}):
        here = [one for one in seen if int(one.sent) == second]
        kinds = Counter(one.kind for one in here if one.is_search)
        took = [1000 * one.took for one in here if one.is_search and one.status == 200]
        rows.append({
            "second": second,
            "what": "; ".join(event.what for event in events if int(event.second) == second),
            **{kind: kinds[kind] for kind in COLOURS},
            "suggested": sum(one.status == 200 for one in here if not one.is_search),
            "p50": statistics.median(took) if took else None,
            "longest": 1000 * max(one.took for one in here),
        })  # fmt: skip
    return rows


def timeline_table(results: Entry, form: str) -> str:
    """Seconds in which something was done or went wrong, with those around it; the rest went well."""
    from tabulate import tabulate

    rows = timeline(results["seen"], results["events"])
    bad = {n for n, row in enumerate(rows) if row["what"] or row["answered"] == 0 or _failed(row)}
    shown = [row for n, row in enumerate(rows) if {n, n + 1, n - 1} & bad]
    lines = [
        [row["second"], row["what"], row["answered"], row["refused"], row["no gateway"], row["unclear"],
         row["suggested"], "" if row["p50"] is None else f"{row['p50']:,.0f}", f"{row['longest']:,.0f}"]
        for row in shown
    ]  # fmt: skip
    headers = ("second", "what happened", "answered", "clear error", "no gateway", "unclear", "suggestions",
               "p50, ms", "longest wait, ms")  # fmt: skip
    align = ("right", "left", *["right"] * 7)
    return tabulate(lines, headers, tablefmt=form, disable_numparse=True, colalign=align if lines else None)


def _failed(row: Entry) -> int:
    return row["refused"] + row["no gateway"] + row["unclear"]


def errors_table(results: Entry, form: str) -> str:
    """What users read instead of an answer, most frequent first; ports and numbers as they were."""
    from tabulate import tabulate

    errors = [one for one in results["seen"] if one.status != 200]
    counts = Counter((one.status, one.error) for one in errors)
    lines = []
    for (status, error), n in counts.most_common():
        longest = max(one.took for one in errors if (one.status, one.error) == (status, error))
        shown = "none" if status == NO_GATEWAY else str(status)
        lines.append([f"{n:,}", shown, error, f"{1000 * longest:,.0f}"])
    headers = ("times", "status", "what was read", "longest wait, ms")
    align = ("right", "right", "left", "right")
    return tabulate(lines, headers, tablefmt=form, disable_numparse=True, colalign=align) if lines else ""


def notes(results: Entry) -> list[str]:
    """What the tables' reader must know, one line each."""
    run_, seen = results["run"], results["seen"]
    n_searches = sum(one.is_search for one in seen)
    longest = max(one.took for one in seen)
    lines = [
        f"{n_searches:,} searches, {run_['rate']:g} a second at their own times, and one who types on the "
        f"page ({len(seen) - n_searches:,} suggestions); seconds in which all was well are left out. "
        "A second's figures are of what was sent in it.",
        *(_of_a_start(event) for event in results["events"] if event.what.endswith("started again")),
        f"The longest wait of all: {longest:.2f} s.",
        *(f"Fault: {fault}." for fault in results["faults"]),
        results["machine"],
    ]  # fmt: skip
    return [f"- {line}" for line in lines]


def _of_a_start(event: Event) -> str:
    after = "no answers any more" if event.back is None else f"answers again {event.back:.1f} s later"
    return f"{event.what}: {after}."


def draw(results: Entry, file: Path) -> None:
    """Searches by what came of them, second by second, and how long they took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = timeline(results["seen"], results["events"])
    seconds = [row["second"] for row in rows]
    figure, (counts, waits) = plt.subplots(
        2, 1, figsize=(12, 7), sharex=True, height_ratios=(2, 1), facecolor="white"
    )
    below = [0] * len(rows)
    for kind, colour in COLOURS.items():
        values = [row[kind] for row in rows]
        if any(values):
            label = {"refused": "clear error (503)", "unclear": "unclear error"}.get(kind, kind)
            counts.bar(seconds, values, 0.9, below, color=colour, label=label, align="edge")
            below = [a + b for a, b in zip(below, values, strict=True)]
    middles = [second + 0.5 for second in seconds]
    suggested = [row["suggested"] for row in rows]
    counts.plot(middles, suggested, color="#000000", marker=".", linewidth=1, label="suggestions answered")
    waits.plot(middles, [row["longest"] for row in rows], color="#0072b2", label="longest wait")
    waits.plot(middles, [row["p50"] for row in rows], color="#009e73", label="p50 of the answered")
    top = max(below, default=1)
    for event in results["events"]:
        for axis in (counts, waits):
            axis.axvline(event.second, color="#555555", linestyle="--", linewidth=1)
        counts.text(event.second, 1.02 * top, event.what, rotation=35, fontsize=8, color="#333333")
    counts.set(ylabel="searches sent in a second", ylim=(0, top))
    waits.set(yscale="log", xlabel="seconds", ylabel="milliseconds")
    for axis in (counts, waits):
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axis.grid(which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
