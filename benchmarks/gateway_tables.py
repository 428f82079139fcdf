"""What benchmarks/gateway.py makes of its measurements: a table a part, notes with the goals, the picture.

Results are what --json holds: `machine`, `run` (what was asked), and of each measured part
`a`: `titles`, `shared`, `rss_anon` by system, `rounds` (a measurement each, as in serving_tables);
`b`: `sizes` (name, title), `measured` (size, length, requests, rate in requests/s, average in ms, errors);
`c`: `titles`, `words`, `typed`, and `systems` as gateway_typing.measure returns them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving_tables import MEBIBYTE, medians

Entry = dict[str, Any]

GOAL_TIMES, GOAL_TIMES_CUDA, GOAL_CLIENTS = 3, 5, 64
IDLE_SLACK = 1.05  # of p50: rounds of the same server differ by as much
GOAL_TYPED_MS = 50
PAIRS = (("rows", "rows-apart", "One process"), ("served", "served-apart", "Beside an index server"))
STYLES = {
    "rows": ("#d55e00", "o", "-"),
    "rows-apart": ("#d55e00", "s", "--"),
    "served": ("#0072b2", "o", "-"),
    "served-apart": ("#0072b2", "s", "--"),
}


def report(results: Entry, form: str) -> str:
    """The tables of the measured parts and their notes; `form` is one of tabulate's."""
    parts = [table(results[name], form) for name, table in TABLES.items() if name in results]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in notes(results))])


def text_table(part: Entry, form: str) -> str:
    """One row a number of clients and a gateway."""
    figures = medians(part["rounds"])
    lines = []
    for clients in dict.fromkeys(clients for _, clients in figures):
        for name, title in part["titles"].items():
            if one := figures.get((name, clients)):
                said = [f"{one['rate']:,.0f}", f"{one['p50']:,.1f}", f"{one['p99']:,.1f}"]
                lines.append(
                    [f"{clients:,}", title, *said, f"{one['errors']:,}", f"{one['cpu_us'] / 1000:,.1f}"]
                )
    headers = ("clients", "gateway", "requests/s", "p50, ms", "p99, ms", "errors", "gateway CPU, ms")
    return _tabulated(lines, headers, form, ("right", "left"))


def encoder_table(part: Entry, form: str) -> str:
    """One row a length, the sizes side by side."""
    by_key = {(one["length"], one["size"]): one for one in part["measured"]}
    lines = []
    for length in dict.fromkeys(length for length, _ in by_key):
        line = [f"{length:,}"]
        for size in part["sizes"]:
            one = by_key[length, size["name"]]
            line += [
                f"{one['rate']:,.0f}",
                f"{one['average']:,.0f}",
                f"{one['requests']:,}",
                f"{one['errors']:,}",
            ]
        lines.append(line)
    headers = ["tokens"]
    for size in part["sizes"]:
        headers += [f"{size['title']}: requests/s", "average, ms", "requests", "errors"]
    return _tabulated(lines, headers, form, ("right",))


def typing_table(part: Entry, form: str) -> str:
    """One row a system."""
    lines = [
        [
            name, f"{one['seconds']:,.1f}", f"{one['bytes']:,.0f}", f"{one['asked']:,}",
            *(f"{one[p]:,.2f}" for p in ("p50", "p95", "p99")),
            f"{one['found_exact']:.0%}", f"{one['found_slip']:.0%}",
        ]
        for name, one in part["systems"].items()
    ]  # fmt: skip
    headers = ("as one types", "build, s", "bytes a title", "keys asked", "p50, ms", "p95, ms", "p99, ms",
               "shown at the last key", "with a slip")  # fmt: skip
    return _tabulated(lines, headers, form, ("left",))


TABLES = {"a": text_table, "b": encoder_table, "c": typing_table}


def _tabulated(lines: list[list[str]], headers: Any, form: str, aligned: tuple[str, ...]) -> str:
    from tabulate import tabulate

    align = (*aligned, *["right"] * (len(headers) - len(aligned)))
    return tabulate(lines, headers, tablefmt=form, disable_numparse=True, colalign=align if lines else None)


def notes(results: Entry) -> list[str]:
    """What the tables' reader must know, and how the goals came out, one line each."""
    run_ = results["run"]
    cores = "1 core" if run_["cores"] == 1 else f"{run_['cores']} cores"
    lines = [f"Servers and load on the same {cores}, encoders on {run_['device']} and without their cache of "
             "vectors: every text is computed."]  # fmt: skip
    if "a" in results:
        lines += _of_texts(run_, results["a"])
    if "b" in results:
        lines += _of_encoders(run_, results["b"])
    if "c" in results:
        lines += _of_typing(results["c"])
    return [*lines, results["machine"]]


def _of_texts(run_: Entry, part: Entry) -> Iterator[str]:
    yield (
        f"Text in, documents out: {part['queries']:,} queries (3 to 8 words in a row of a document) to "
        f"{run_['documents']:,} documents, ten results, wrk's keep-alive connections. Median of "
        f"{run_['rounds']} rounds of {run_['seconds']:g} s, gateways in turn; errors are of all rounds. One "
        "by one: the same gateway, but each text is encoded and searched by itself, and the index server "
        "joins no searches."
    )
    shares = _each(part, "shared", lambda share: f"{share:.0%}")
    yield f"Of the first gateway's documents each finds: {shares}."
    yield from compared(run_, part)
    sizes = _each(part, "rss_anon", lambda size: f"{size / MEBIBYTE:,.0f} MiB")
    yield f"RssAnon of the gateways at the end: {sizes}."


def _each(part: Entry, key: str, said: Any) -> str:
    return ", ".join(f"{part['titles'][name]} {said(value)}" for name, value in part[key].items())


def compared(run_: Entry, part: Entry) -> Iterator[str]:
    """Together beside one by one: requests/s where many ask, half of the answers where one does."""
    figures = medians(part["rounds"])
    goal = GOAL_TIMES_CUDA if run_["device"] == "cuda" else GOAL_TIMES
    for together, apart, title in PAIRS:
        ours, theirs = (figures.get((name, GOAL_CLIENTS)) for name in (together, apart))
        if ours and theirs:
            times = ours["rate"] / max(theirs["rate"], 1e-9)
            yield (
                f"{title}: {times:.1f} times the requests/s at {GOAL_CLIENTS} clients (goal {goal}: "
                f"{_met(times >= goal)})."
            )
        ours, theirs = (figures.get((name, 1)) for name in (together, apart))
        if ours and theirs:
            yield (
                f"{title}: p50 at 1 client {ours['p50']:.1f} ms, one by one {theirs['p50']:.1f} ms (goal no "
                f"more, but for 5 %: {_met(ours['p50'] <= IDLE_SLACK * theirs['p50'])})."
            )


def _met(is_met: bool) -> str:
    return "reached" if is_met else "missed"


def _of_encoders(run_: Entry, part: Entry) -> Iterator[str]:
    few = any(one["requests"] < run_["requests"] * 0.99 for one in part["measured"])
    fewer = (
        f", fewer where they would take more than {run_['hey_seconds']:g} s (column requests)" if few else ""
    )
    sizes = "; ".join(size["title"] for size in part["sizes"])
    yield (
        f"The encoder alone: hey -n {run_['requests']} -c {run_['hey_clients']} on POST /embed{fewer}, "
        "float32, texts of so many tokens, the model's own included, each with another first word: equal "
        f"texts would be computed once. Sizes: {sizes}. The larger one is the version's encoder with each "
        "layer twice: its speed counts, not its vectors."
    )


def _of_typing(part: Entry) -> Iterator[str]:
    yield (
        f"As one types: {part['titles']:,} made titles (words by Zipf's law from {part['words']:,} of the "
        f"documents, a fifth Hangul), {part['typed']:,} of them typed key by key, 12 keys at most, half with "
        "a slip, ten results, one thread. Peers know neither slips nor unfinished syllables and are asked at "
        "some keys only. Bytes without the titles themselves; for the scan it is the column."
    )
    for name, one in part["systems"].items():
        if name.startswith("Titles"):
            yield (
                f"p95 of a key {one['p95']:.1f} ms over {part['titles']:,} titles (goal less than "
                f"{GOAL_TYPED_MS}: {_met(one['p95'] < GOAL_TYPED_MS)})."
            )


# --- The picture ---------------------------------------------------------------------------------------


def draw(results: Entry, file: Path) -> None:
    """Write the picture, a panel a part; its kind is told by the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(name, panel) for name, panel in PANELS.items() if name in results]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 5.5), facecolor="white", squeeze=False
    )
    for (name, panel), axis in zip(panels, axes[0], strict=True):
        panel(results[name], axis)
        axis.grid(which="major", color="#cccccc", linewidth=0.8)
        axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_texts(part: Entry, axis: Any) -> None:
    figures = medians(part["rounds"])
    for name, label in part["titles"].items():
        points = [(clients, one["rate"]) for (system, clients), one in figures.items() if system == name]
        colour, mark, line = STYLES[name]
        axis.plot(
            *zip(*points, strict=True), color=colour, marker=mark, linestyle=line, linewidth=2, label=label
        )
    axis.set(xscale="log", xlabel="clients", ylabel="requests a second", title="text in, documents out")
    _plain(axis.xaxis, sorted({clients for _, clients in figures}))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


def _draw_encoders(part: Entry, axis: Any) -> None:
    for size, colour in zip(part["sizes"], ("#d55e00", "#0072b2"), strict=True):
        points = [(one["length"], one["rate"]) for one in part["measured"] if one["size"] == size["name"]]
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=2, label=size["title"])
    axis.set(xscale="log", yscale="log", xlabel="tokens of a text", ylabel="requests a second",
             title="the encoder alone")  # fmt: skip
    _plain(axis.xaxis, sorted({one["length"] for one in part["measured"]}))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.legend(frameon=False)


def _plain(axis: Any, ticks: list[int]) -> None:
    axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_minor_locator(_nothing())


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _draw_typing(part: Entry, axis: Any) -> None:
    names = list(part["systems"])[::-1]
    values = [part["systems"][name]["p95"] for name in names]
    colours = ["#d55e00" if name.startswith("Titles") else "#0072b2" for name in names]
    bars = axis.barh([name.replace(", ", ",\n", 1) for name in names], values, color=colours)
    axis.bar_label(bars, [f"{value:,.1f}" for value in values], padding=3)
    axis.axvline(GOAL_TYPED_MS, color="#555555", linestyle="--", linewidth=1)
    axis.set(
        xscale="log", xlabel="p95 of a key, ms (dashed: goal)", title=f"{part['titles']:,} titles, key by key"
    )
    axis.margins(x=0.15)


PANELS = {"a": _draw_texts, "b": _draw_encoders, "c": _draw_typing}
