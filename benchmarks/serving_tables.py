"""What benchmarks/serving.py makes of its measurements: medians, the table, its notes, the picture.

Results are what --json holds: `run` (what was asked), `machine`, `versions` (what was built), `titles` and
`recalls` by system, `rounds` (a measurement each: system, clients, rate in requests/s, p50, p99, p999 in ms,
errors, cpu_us a request), `bare` (a round each: by version, by kind of call), and `rss_anon` in bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

MEBIBYTE = 1024**2
MEDIANS = ("rate", "p50", "p99", "p999", "cpu_us")
HEADERS = ("clients", "system", "requests/s", "p50, ms", "p99, ms", "p99.9, ms", "errors", "server CPU, µs")
GOAL_TIMES, GOAL_CLIENTS = 5, 64
VERSIONS = {"tuned": "this index", "tfrs": "tfrs's layer"}
# Colour and mark: this server in warm colours, its gRPC dashed; the peer blue.
STYLES = {
    "tuned": ("#d55e00", "o", "-"),
    "tfrs": ("#e69f00", "o", "-"),
    "fastapi": ("#0072b2", "s", "-"),
    "tuned-grpc": ("#d55e00", "^", "--"),
    "tfrs-grpc": ("#e69f00", "^", "--"),
}


def report(results: Entry, form: str) -> str:
    """Both tables and their notes; `form` is one of tabulate's."""
    parts = [table(results, form), bare_table(results, form), "\n".join(notes(results))]
    return "\n\n".join(part for part in parts if part)


def medians(rounds: Sequence[Entry]) -> dict[tuple[str, int], Entry]:
    """By (system, clients): the median of each figure, and the sum of the errors."""
    found = {}
    for key in dict.fromkeys((one["system"], one["clients"]) for one in rounds):
        same = [one for one in rounds if (one["system"], one["clients"]) == key]
        found[key] = {name: statistics.median(one[name] for one in same) for name in MEDIANS}
        found[key]["errors"] = sum(one["errors"] for one in same)
    return found


def table(results: Entry, form: str) -> str:
    """One row a number of clients and a system; `form` is one of tabulate's."""
    from tabulate import tabulate

    figures = medians(results["rounds"])
    lines = []
    for clients in dict.fromkeys(clients for _, clients in figures):
        for name, title in results["titles"].items():
            if one := figures.get((name, clients)):
                said = [f"{one['rate']:,.0f}", *(f"{one[p]:,.2f}" for p in ("p50", "p99", "p999"))]
                lines.append([f"{clients:,}", title, *said, f"{one['errors']:,}", f"{one['cpu_us']:,.0f}"])
    align = ("right", "left", *["right"] * 6)
    return tabulate(lines, HEADERS, tablefmt=form, disable_numparse=True, colalign=align if lines else None)


def bare_table(results: Entry, form: str) -> str:
    """The graph without a server: one row a version and a kind of call; empty where it was not measured."""
    from tabulate import tabulate

    rounds = [one for one in results["bare"] if one]
    lines = []
    for version in rounds[0] if rounds else ():
        for kind in rounds[0][version]:
            each = [one[version][kind] for one in rounds]
            middle = {name: statistics.median(one[name] for one in each) for name in each[0]}
            times = [f"{middle[p]:,.3f}" for p in ("p50", "p99", "p999")]
            lines.append([VERSIONS[version], kind, f"{middle['rate']:,.0f}", *times])
    if not lines:
        return ""
    headers = ("graph in process", "called by", "queries/s", "a call: p50, ms", "p99, ms", "p99.9, ms")
    align = ("left", "left", *["right"] * 4)
    return tabulate(lines, headers, tablefmt=form, disable_numparse=True, colalign=align)


def notes(results: Entry) -> list[str]:
    """What the tables' reader must know, and how the goals came out, one line each."""
    run_ = results["run"]
    cores = "1 core" if run_["cores"] == 1 else f"{run_['cores']} cores"
    lines = [
        f"{run_['rows']:,} rows of {run_['dim']} ({run_['vectors']}), {run_['queries']:,} queries that are "
        f"no rows, one a request, ten results. Servers and load on the same {cores}; keep-alive connections, "
        f"each with one request at a time. Median of {run_['rounds']} rounds of {run_['seconds']:g} s, "
        "systems in turn; errors are of all rounds.",
        *_of_recall(results),
        *_of_grpc(results),
        *_of_the_peer(run_),
        *compared(results),
        f"RssAnon at the end: {_each(results, 'rss_anon', lambda size: f'{size / MEBIBYTE:,.0f} MiB')}.",
        *([f"Flags of this server: {' '.join(run_['flags'])}."] if run_["flags"] else []),
        results["machine"],
    ]
    return [f"- {line}" for line in lines]


def _each(results: Entry, key: str, said: Callable[[float], str]) -> str:
    return ", ".join(f"{results['titles'][name]} {said(value)}" for name, value in results[key].items())


def _of_recall(results: Entry) -> Iterator[str]:
    built = [
        f"{VERSIONS[name]} {one['recall']:.3f} ({one['num_leaves_to_search']} of {one['num_leaves']} leaves, "
        f"{one['candidates']} candidates)"
        for name, one in results["versions"].items()
    ]
    answers = _each(results, "recalls", lambda recall: f"{recall:.3f}")
    yield f"Recall@10 of the versions: {', '.join(built)}; of the first answers by REST: {answers}."


def _of_grpc(results: Entry) -> Iterator[str]:
    if any(name.endswith("grpc") for name in results["titles"]):
        yield (
            "By REST the load is wrk's, one thread; by gRPC that of Python's asyncio client, in as many "
            "processes as cores: it costs about as much as the server, so that those rates are lower bounds."
        )


def _of_the_peer(run_: Entry) -> Iterator[str]:
    if run_["ways"]:
        tried = ", ".join(f"{way} {rate:,.0f}" for way, rate in run_["ways"].items())
        yield (
            "FastAPI was tried with the layer called or its signature, in threads or in the event loop "
            f"(requests/s at {GOAL_CLIENTS} clients: {tried}); {run_['way']} is measured."
        )


def compared(results: Entry) -> Iterator[str]:
    """This server beside FastAPI: requests/s where many ask, the slowest answers where one does."""
    figures = medians(results["rounds"])
    for name in ("tfrs", "tuned"):
        title = results["titles"].get(name)
        ours, theirs = (figures.get((system, GOAL_CLIENTS)) for system in (name, "fastapi"))
        if ours and theirs:
            times = ours["rate"] / theirs["rate"]
            yield (
                f"{title}: {times:.1f} times FastAPI's requests/s at {GOAL_CLIENTS} clients "
                f"(goal {GOAL_TIMES}: {_met(times >= GOAL_TIMES)})."
            )
        ours, theirs = (figures.get((system, 1)) for system in (name, "fastapi"))
        if ours and theirs:
            yield (
                f"{title}: p99 at 1 client {ours['p99']:.2f} ms, FastAPI's {theirs['p99']:.2f} ms "
                f"(goal no more: {_met(ours['p99'] <= theirs['p99'])})."
            )


def _met(is_met: bool) -> str:
    return "reached" if is_met else "missed"


def draw(results: Entry, file: Path) -> None:
    """Write the picture; its kind is told by the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = medians(results["rounds"])
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), sharex=True, sharey=True, facecolor="white")
    for axis, percentile, title in zip(
        axes, ("p50", "p99"), ("half of the requests", "99 of 100"), strict=True
    ):
        for name, label in results["titles"].items():
            points = [
                (one["rate"], one[percentile], clients) for (n, clients), one in figures.items() if n == name
            ]
            colour, mark, line = STYLES[name]
            axis.plot(
                [rate for rate, _, _ in points], [ms for _, ms, _ in points], color=colour, marker=mark,
                linestyle=line, linewidth=2, label=label,
            )  # fmt: skip
            for rate, ms, clients in points:
                beside = {"textcoords": "offset points", "xytext": (5, 5), "fontsize": 8, "color": colour}
                axis.annotate(f"{clients:,}", (rate, ms), **beside)
        axis.set(
            yscale="log", xlabel="requests a second", title=f"{title} are answered within (beside: clients)"
        )
        axis.set_xlim(left=0)
        axis.grid(which="major", color="#cccccc", linewidth=0.8)
        axis.grid(which="minor", color="#eeeeee", linewidth=0.5)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].set_ylabel("milliseconds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    run_ = results["run"]
    figure.suptitle(
        f"{run_['rows']:,} rows of {run_['dim']}, recall@10 {run_['recall']:g}, {run_['cores']} cores"
    )
    figure.tight_layout(rect=(0, 0.04 + 0.04 * (-(-len(labels) // 3)), 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)
