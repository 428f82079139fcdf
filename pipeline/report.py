"""Draws report.html from report.json's figures alone: one self-contained page, plots as inline SVG.

The page holds no date and no path, so that equal figures give an equal page, byte for byte.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
CUTOFFS = (1, 5, 20, 100)
SYSTEMS = {"tuned": "Tuned model", "untuned": "Untuned model", "bm25": "BM25"}

# Okabe and Ito's palette (2008), told apart with every common colour blindness; shapes tell it again.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B3A100", "#888888")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # matplotlib's
SHAPES = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")  # the same, for the legend
OF_SYSTEM = {"tuned": 0, "untuned": 1, "bm25": 2}
INK = "#010203"  # drawn in this, then turned into currentColor: dark on light, light on dark
LONGEST_SESSION = 20  # the last bar holds this and all that are longer
WIDTH = 5.4  # inches: at 72 points each a phone's width, so that letters stay readable there


def render(report: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        report: the content of report.json.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "figure": figure,
        "thousands": count,
        "span": span,
        "interval_of_figures": lambda bounds: interval(bounds, figure),
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        plots=plots(report),
        systems=SYSTEMS,
        cutoffs=CUTOFFS,
        legend=legend(report["map"]),
        verdicts=verdicts(report["retrieval"]),
    )


def summary(report: Mapping[str, Any]) -> list[list[str]]:
    """The few quality figures for a closing table: rows of figure, value, 95 % interval, measured on."""
    index, retrieval = report["index"], report["retrieval"]
    rows = [
        [
            "index: recall@10",
            figure(index["recall_at_10"]),
            interval(index["interval"], figure),
            f"{count(index['n_queries'])} held-out queries",
        ]
    ]
    if retrieval["tuned"] is None:
        return [*rows, ["next document in the top 20", "absent", "", retrieval["reason"]]]
    measured_on = f"{count(retrieval['n_pairs'])} held-out pairs"
    for name, words in SYSTEMS.items():
        values = retrieval[name]
        rows.append(
            [
                f"{words}: next document in the top 20",
                figure(values["accuracy_at_20"]),
                interval(retrieval["intervals"][f"{name}_at_20"], figure),
                measured_on,
            ]
        )
    for name in ("untuned", "bm25"):
        difference = retrieval[f"tuned_minus_{name}_at_20"]
        value = f"{difference['mean']:+.3f}"
        rows.append(
            [f"tuned minus {name}, top 20", value, interval(difference, "{:+.3f}".format), measured_on]
        )
    return rows


# --- words ------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def count(value: int) -> str:
    return f"{value:,}"


def interval(bounds: Mapping[str, float] | None, form: Any = percent) -> str:
    """ "7.1 % to 10.4 %", or nothing where there was nothing to measure."""
    if not bounds:
        return ""
    return f"{form(bounds['low'])} to {form(bounds['high'])}"


def span(bounds: Mapping[str, float]) -> str:
    """ "7.1–10.4" for narrow tables, in percent."""
    return interval(bounds, lambda value: f"{100 * value:.1f}").replace(" to ", "–")


def verdicts(retrieval: Mapping[str, Any]) -> list[str]:
    """What the two differences say, in words."""
    names = {"untuned": "the same model before tuning", "bm25": "BM25"}
    return [
        verdict(retrieval[f"tuned_minus_{name}_at_20"], words)
        for name, words in names.items()
        if retrieval[f"tuned_minus_{name}_at_20"]
    ]


def verdict(difference: Mapping[str, float], other: str) -> str:
    """One sentence: the size of a difference at 20, and whether chance could explain it."""
    mean, low, high = (100 * difference[end] for end in ("mean", "low", "high"))
    better = "better" if mean >= 0 else "worse"
    size = f"Among the first 20, the tuned model is {abs(mean):.1f} points {better}"
    bounds = f"(95 % interval {low:+.1f} to {high:+.1f})"
    if low <= 0 <= high:
        return f"{size} than {other} {bounds}: the interval includes zero, so no difference is shown."
    return f"{size} than {other} {bounds}: more than chance explains."


def legend(map_: Mapping[str, Any] | None) -> list[dict[str, str]]:
    groups = map_["groups"] if map_ else []
    return [
        {"name": name, "colour": COLOURS[look], "shape": SHAPES[look]}
        for name, look in zip(groups, looks(groups), strict=True)
    ]


def looks(groups: list[str]) -> list[int]:
    """Which colour and shape each group has; what is left over is grey."""
    return [len(COLOURS) - 1 if name == "other" else i for i, name in enumerate(groups)]


# --- plots ------------------------------------------------------------------------------------------------


def plots(report: Mapping[str, Any]) -> dict[str, "Markup | None"]:
    """Every plot as inline SVG; None where there is nothing to draw."""
    import matplotlib as mpl

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: it can be selected, read aloud, and is small
        "svg.hashsalt": "report",  # ids from the content alone
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "text.parse_math": False,  # a group called "$x$" is a name
    }
    with mpl.rc_context(style):
        return {
            "accuracy": accuracy_plot(report),
            "sessions": session_plot(report),
            "training": training_plot(report),
            "recall": recall_plot(report),
            "map_before": map_plot(report, "before"),
            "map_after": map_plot(report, "after"),
        }


def accuracy_plot(report: Mapping[str, Any]) -> "Markup | None":
    retrieval = report["retrieval"]
    if retrieval["tuned"] is None:
        return None
    with canvas(3.0) as (drawn, axes):
        for name, words in SYSTEMS.items():
            look = OF_SYSTEM[name]
            at = [position + 0.12 * (look - 1) for position in range(len(CUTOFFS))]
            bounds = [retrieval["intervals"][f"{name}_at_{k}"] for k in CUTOFFS]
            values = [100 * b["mean"] for b in bounds]
            reach = [[100 * abs(b[end] - b["mean"]) for b in bounds] for end in ("low", "high")]
            axes.errorbar(
                at, values, yerr=reach, fmt=MARKERS[look], color=COLOURS[look], capsize=3, label=words
            )
        axes.set_xticks(range(len(CUTOFFS)), [f"first {k}" for k in CUTOFFS])
        axes.set_ylabel("found, % of pairs")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
    return svg(
        drawn, "accuracy", alt(report, "Share of held-out pairs found, by system, with 95 % intervals")
    )


def session_plot(report: Mapping[str, Any]) -> "Markup | None":
    lengths = {int(length): n for length, n in report["session_lengths"].items()}
    if not lengths:
        return None
    last = min(LONGEST_SESSION, max(lengths))
    bars = dict.fromkeys(range(1, last + 1), 0)
    for length, n in lengths.items():
        bars[max(1, min(length, last))] += n
    with canvas(2.6) as (drawn, axes):
        axes.bar([str(n) for n in bars], list(bars.values()), color=COLOURS[0], width=0.8)
        ticks = [n for n in bars if n in (1, last) or n % 5 == 0]
        axes.set_xticks(
            [n - 1 for n in ticks], [f"{n}+" if n == last < max(lengths) else str(n) for n in ticks]
        )
        axes.set_xlabel("documents a session")
        axes.set_ylabel("sessions")
    return svg(drawn, "sessions", alt(report, "Bars: how many sessions have 1, 2, 3, ... documents"))


def training_plot(report: Mapping[str, Any]) -> "Markup | None":
    lines = report["model"]["training"]
    curves = [
        ("loss", "loss", COLOURS[4], "-"),
        ("accuracy_at_20", "found in the first 20 (dev)", COLOURS[0], "-"),
        ("spearman_dot", "Spearman, dot product (dev)", COLOURS[2], "--"),
    ]
    points = {key: [(x["step"], x[key]) for x in lines if x.get(key) is not None] for key, *_ in curves}
    if not any(points.values()):
        return None
    with canvas(3.0) as (drawn, axes):
        quality = axes.twinx() if points["loss"] else axes
        handles = []
        for key, words, colour, dash in curves:
            if points[key]:
                on = axes if key == "loss" else quality
                marker = "" if len(points[key]) > 40 else "."
                handles += on.plot(
                    *zip(*points[key], strict=True), dash, color=colour, marker=marker, label=words
                )
        axes.set_xlabel("training step")
        if points["loss"]:
            axes.set_ylabel("loss")
            quality.spines["right"].set_visible(True)
        quality.set_ylabel("dev figures")
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return svg(drawn, "training", alt(report, "Loss and the figures on dev pairs against the training step"))


def recall_plot(report: Mapping[str, Any]) -> "Markup | None":
    index = report["index"]
    sweep = [point for point in index["sweep"] if point["recall_at_10"] is not None]
    if not sweep:
        return None
    leaves = [point["num_leaves_to_search"] for point in sweep]
    with canvas(3.0) as (drawn, axes):
        axes.plot(leaves, [p["recall_at_10"] for p in sweep], "-o", color=COLOURS[0], ms=4, label="sweep")
        low, high = ([point["interval"][end] for point in sweep] for end in ("low", "high"))
        axes.fill_between(leaves, low, high, color=COLOURS[0], alpha=0.2, lw=0)
        shipped = index["settings"].get("num_leaves_to_search")
        if shipped and index["recall_at_10"] is not None:
            axes.plot([shipped], [index["recall_at_10"]], "*", color=COLOURS[4], ms=14, label="shipped")
        if index["target_recall"] is not None:
            axes.axhline(index["target_recall"], color=INK, ls=":", lw=1.2, label="target")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel(
            "leaves searched"
            + (f" of {index['settings']['num_leaves']}" if index["settings"].get("num_leaves") else "")
        )
        axes.set_ylabel("recall@10")
        axes.legend(loc="lower right")
    return svg(
        drawn, "recall", alt(report, "Recall@10 against leaves searched, the shipped point and the target")
    )


def map_plot(report: Mapping[str, Any], when: str) -> "Markup | None":
    map_ = report["map"]
    if not map_:
        return None
    look_of = looks(map_["groups"])
    points = map_["points"]
    with canvas(4.4, width=4.8) as (drawn, axes):
        for a, b in map_["lines"]:
            (x0, y0), (x1, y1) = points[a][when], points[b][when]
            axes.plot([x0, x1], [y0, y1], color=INK, alpha=0.1, lw=0.6, zorder=1)
        for group, look in enumerate(look_of):
            of_group = [point[when] for point in points if point["group"] == group]
            x, y = zip(*of_group, strict=True)
            axes.scatter(x, y, s=24, marker=MARKERS[look], color=COLOURS[look], lw=0, alpha=0.9, zorder=2)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(f"{when} tuning ({percent(map_['explained'][when])} of the variance)", fontsize=10)
    words = f"Held-out documents in two dimensions {when} tuning, coloured by group, pairs joined by lines"
    return svg(drawn, f"map-{when}", alt(report, words))


def alt(report: Mapping[str, Any], words: str) -> str:
    """A plot's title, which also says whose figures they are."""
    return f"{words}. Data: {report['description']}." if report["description"] else f"{words}."


@contextmanager
def canvas(height: float, width: float = WIDTH) -> Iterator[tuple["Figure", "Axes"]]:
    """An empty plot, in inches; without pyplot, which keeps every figure in the process."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.add_subplot()
    axes.grid(axis="y", color=INK, alpha=0.12, lw=0.8)
    axes.set_axisbelow(True)
    yield drawn, axes


def svg(drawn: "Figure", name: str, title: str) -> "Markup":
    """The plot as one <svg> element with a title, in the colours of the page."""
    from markupsafe import Markup

    file = io.StringIO()
    drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    # Ids must be unique in the page, and matplotlib counts from one in each plot.
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", file.getvalue())
    root = ET.fromstring(text.replace(INK, "currentColor"))
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for size in ("width", "height"):  # the page decides, the viewBox keeps the shape
        del root.attrib[size]
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    root.set("style", f"max-width: {drawn.get_figwidth() * 1.5:.2f}in")
    label = ET.Element(f"{{{SVG}}}title", {"id": f"{name}-title"})
    label.text = title
    root.insert(0, label)
    return Markup(ET.tostring(root, encoding="unicode"))
