"""Draws report.html from report.json's figures alone: one self-contained page, plots as inline SVG.

The page holds no date and no path, so that equal figures give an equal page, byte for byte.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import STORAGES
from pipeline.recall import KINDS as ASKED
from pipeline.recall import shortfalls

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
CUTOFFS = (1, 5, 20, 100)
SYSTEMS = {  # in the order of every table; a report need not have all of them
    "tuned": "Tuned model",
    "untuned": "Untuned model",
    "published": "Published model",
    "bm25": "BM25",
    "rrf": "BM25 + tuned, reciprocal rank fusion",
    "weighted": "BM25 + tuned, weighted sum",
}
COLUMNS = {  # the same at the head of narrow columns
    "tuned": "Tuned",
    "untuned": "Untuned",
    "published": "Published",
    "bm25": "BM25",
    "rrf": "Fused (RRF)",
    "weighted": "Fused (sum)",
}
OTHERS = {  # what the tuned model is judged against, in a sentence
    "untuned": "the same model before tuning",
    "published": "the published model",
    "bm25": "BM25",
}
HYBRIDS = ("rrf", "weighted")
KINDS = {  # of queries, as a weight is fitted on them
    "document": "documents asked as queries",
    "typed": "queries of a few of a document's words",
    "logged": "logged queries",
}
POPULARITY = {
    "head": "most read",
    "middle": "in between",
    "tail": "least read",
    "never": "never read in training",
}
BUILD_SETTINGS = ("num_leaves", "spill", "anisotropic_quantization_threshold", "quantize_reordering")
PERCENTILES = {"p50": "median", "p95": "95th percentile", "p99": "99th"}
FORGETTING = 0.02  # a larger fall of Spearman is called out
MANY_CUT = 0.1  # of the texts longer than the model reads: then passages are advised
CHOSEN_BY = {
    "retrieval": "retrieval: the right document among the first 20, on dev pairs",
    "similarity": "similarity: Spearman of the dot product, on dev pairs",
}

# Okabe and Ito's palette (2008), told apart with every common colour blindness; shapes tell it again.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B3A100", "#888888")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # matplotlib's
SHAPES = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")  # the same, for the legend
OF_SYSTEM = {"tuned": 0, "untuned": 1, "bm25": 2, "published": 3, "rrf": 4, "weighted": 5}
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
        "or_dash": or_dash,
        "span": span,
        "interval_of_figures": lambda bounds: interval(bounds, figure),
        "present": present,
        "verdicts": verdicts,
        "weight": weight_words,
    }
    retrieval, model = report["retrieval"], report["model"]
    page = environment.get_template("report.html.j2").render(
        report=report,
        plots=plots(report),
        systems=SYSTEMS,
        columns=COLUMNS,
        others=OTHERS,
        cutoffs=CUTOFFS,
        legend=legend(report["map"]),
        hybrid=hybrid_verdicts(retrieval.get("hybrid")),
        breakdowns=breakdowns(retrieval),
        typed=retrieval.get("typed"),
        logged=None if asks_queries(retrieval) else retrieval.get("logged"),  # else they are the main figures
        asks_queries=asks_queries(retrieval),
        answers=retrieval.get("answers"),
        encoding=encoding_facts(report.get("encoding") or {}),
        cut=cut_words(report.get("encoding") or {}),
        training=training_facts(model),
        contract=contract_words(report["index"]),
        short=[str(short) for short in shortfalls(report["index"], report["index"]["contract"])],
        layer=layer_words(report["index"]),
        index_facts=index_facts(report["index"], report.get("latency_ms")),
        index_groups=index_groups(report["index"]),
        builds=build_rows(report["index"]),
        largest_sample=max((build["n_rows"] for build in report["index"].get("builds") or []), default=0),
        kinds=ASKED,
        learning=learning_words(model.get("learning_curve")),
        curve=curve_points(model.get("learning_curve")),
        similarity=similarity_rows(report.get("similarity")),
        forgetting=forgetting(report.get("similarity") or {}),
        forgetting_at=FORGETTING,
        lost=report.get("lost") or [],
    )
    return re.sub(r"(\d) %", "\\1\N{NO-BREAK SPACE}%", page)  # no line begins with a percent sign


def summary(report: Mapping[str, Any]) -> list[list[str]]:
    """The few quality figures for a closing table: rows of figure, value, 95 % interval, measured on."""
    retrieval = report["retrieval"]
    rows = [contract_row(report["index"])]
    next_document, answer = "next document in the top 20", "answer of a logged query in the top 20"
    if retrieval["tuned"] is None:
        rows.append([next_document, "absent", "", retrieval["reason"]])
    elif not asks_queries(retrieval):
        rows += system_rows(retrieval, next_document, f"{count(retrieval['n_pairs'])} held-out pairs")
    logged = retrieval if asks_queries(retrieval) else retrieval.get("logged")
    if logged:
        rows += system_rows(logged, answer, f"{count(logged['n_pairs'])} logged pairs")
    return rows


def contract_row(index: Mapping[str, Any]) -> list[str]:
    """The recall that the contract names, against its target."""
    contract = index["contract"]
    asked = f"{count(contract['n_queries'])} {ASKED.get(contract['kind'] or '', 'held-out queries')}"
    return [
        f"index: recall@{contract['k']}",
        figure(contract["recall_at_k"]),
        interval(contract["interval"], figure),
        f"{asked}, target {figure(contract['target_recall'])}"
        + ("" if contract["met"] else ": contract not met"),
    ]


def system_rows(figures: Mapping[str, Any], what: str, measured_on: str) -> list[list[str]]:
    """One row a system that was measured, then one for each other that the tuned model is judged against."""
    rows = [
        [
            f"{words}: {what}",
            figure(figures[name]["accuracy_at_20"]),
            interval(figures["intervals"][f"{name}_at_20"], figure),
            measured_on,
        ]
        for name, words in present(figures).items()
    ]
    hybrid = figures.get("hybrid") or {}
    differences = {f"tuned minus {name}": figures.get(f"tuned_minus_{name}_at_20") for name in OTHERS}
    differences |= {f"{name} minus tuned": hybrid.get(f"{name}_minus_tuned_at_20") for name in HYBRIDS}
    for words, difference in differences.items():
        if difference:
            value, bounds = f"{difference['mean']:+.3f}", interval(difference, "{:+.3f}".format)
            rows.append([f"{words}, top 20", value, bounds, measured_on])
    return rows


# --- words ------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def count(value: int) -> str:
    return f"{value:,}"


def or_dash(n: float | None) -> str:
    return "–" if n is None else count(round(n))


def interval(bounds: Mapping[str, float] | None, form: Any = percent) -> str:
    """ "7.1 % to 10.4 %", or nothing where there was nothing to measure."""
    if not bounds:
        return ""
    return f"{form(bounds['low'])} to {form(bounds['high'])}"


def span(bounds: Mapping[str, float]) -> str:
    """ "7.1–10.4" for narrow tables, in percent."""
    return interval(bounds, lambda value: f"{100 * value:.1f}").replace(" to ", "–")


def asks_queries(retrieval: Mapping[str, Any]) -> bool:
    """Whether the main figures are of logged queries, because no sessions were held out."""
    return retrieval.get("asked") == "queries"


def present(figures: Mapping[str, Any]) -> dict[str, str]:
    """The systems that were measured, with their words, in the order of every table."""
    return {name: words for name, words in SYSTEMS.items() if figures.get(name)}


def verdicts(figures: Mapping[str, Any]) -> list[str]:
    """What the tuned model's leads say, in words."""
    differences = {words: figures.get(f"tuned_minus_{name}_at_20") for name, words in OTHERS.items()}
    return [verdict(difference, words) for words, difference in differences.items() if difference]


def hybrid_verdicts(hybrid: Mapping[str, Any] | None) -> list[str]:
    """What BM25 adds to the tuned model, in words."""
    if not hybrid:
        return []
    ways = {
        "rrf": f"by reciprocal rank fusion (k = {hybrid['rrf_k']})",
        "weighted": f"by a weighted sum (BM25's weight is {hybrid['weight']:.2g})"
        if hybrid.get("weight") is not None
        else "by a weighted sum",
    }
    said = [
        verdict(difference, "the tuned model alone", f"BM25 joined with the tuned model {way}")
        for name, way in ways.items()
        if (difference := hybrid.get(f"{name}_minus_tuned_at_20"))
        and not (name == "weighted" and hybrid.get("weight") == 0)
    ]
    if hybrid.get("weight") == 0:
        said.append("In a weighted sum no weight of BM25 helped on dev pairs: it is the tuned model alone.")
    return said


def weight_words(figures: Mapping[str, Any]) -> str:
    """The weight of BM25 in the sum, and what it was fitted on; nothing where there is none."""
    hybrid = figures.get("hybrid") or {}
    if hybrid.get("weight") is None:
        return ""
    kind = KINDS.get(hybrid.get("fitted_on") or "")
    fitted = f"fitted on dev pairs of {kind}" if kind else "fitted on dev pairs"
    return f"BM25's weight in the weighted sum is {hybrid['weight']:.2g}, {fitted}."


def verdict(difference: Mapping[str, float], other: str, subject: str = "the tuned model") -> str:
    """One sentence: the size of a difference at 20, and whether chance could explain it."""
    mean, low, high = (100 * difference[end] for end in ("mean", "low", "high"))
    better = "better" if mean >= 0 else "worse"
    size = f"Among the first 20, {subject} is {abs(mean):.1f} points {better}"
    bounds = f"(95 % interval {low:+.1f} to {high:+.1f})"
    if low <= 0 <= high:
        return f"{size} than {other} {bounds}: the interval includes zero, so no difference is shown."
    return f"{size} than {other} {bounds}: more than chance explains."


def breakdowns(retrieval: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of accuracy at 20 by kind of pair; each has what, caption and rows of (name, figures)."""
    by_language = retrieval.get("by_language") or {}
    words = "language" if retrieval.get("language_by") == "language" else "script"
    tables: list[dict[str, Any]] = [
        {
            "what": "popularity",
            "caption": "By popularity, that is how many pairs of the log's training span lead to the "
            "document: thirds of the pairs, and documents that none leads to",
            "rows": rows_of(retrieval.get("by_popularity"), POPULARITY),
        },
        {
            "what": words,
            "caption": "By the language of the document that is to be found"
            if words == "language"
            else "By the script of the query's letters, because the documents name no language",
            "rows": rows_of(by_language, {name: name for name in by_frequency(by_language)}),
        },
        {
            "what": "query length",
            "caption": "By the length of the query: thirds of the pairs, by characters",
            "rows": rows_of(
                retrieval.get("by_query_length"), length_words(retrieval.get("query_lengths") or [])
            ),
        },
    ]
    return [table for table in tables if table["rows"]]


def rows_of(groups: Mapping[str, Any] | None, names: Mapping[str, str]) -> list[tuple[str, Any]]:
    """(words, figures) of the groups that have pairs, in the order of `names`."""
    return [(words, groups[name]) for name, words in names.items() if groups and groups.get(name)]


def by_frequency(groups: Mapping[str, Any]) -> list[str]:
    """The most frequent group first, what is left over last."""
    counted = {name: figures["n_pairs"] for name, figures in groups.items() if figures}
    return sorted(counted, key=lambda name: (name == "other", -counted[name], name))


def length_words(limits: list[int]) -> dict[str, str]:
    """The three lengths with their limits: up to the first, up to the second, more."""
    if len(limits) != 2:
        return {name: name for name in ("short", "middle", "long")}
    short, middle = (count(limit) for limit in limits)
    return {
        "short": f"up to {short} characters",
        "middle": f"up to {middle}",
        "long": f"more than {middle}",
    }


def training_facts(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was trained and how: rows of what and value, of what the report says."""
    facts = [("model before tuning", str(model["base_model"]))]
    if not model["trained"]:
        return facts
    sources, trim = model.get("sources"), model.get("trim")
    if model.get("loss"):
        facts.append(("loss", model["loss"].replace("_", " ")))
    if sources:
        facts += [(f"pairs: {name.replace('_', ' ')}", count(n)) for name, n in sources.items()]
    if model.get("best_by"):
        facts.append(("weights chosen by", CHOSEN_BY.get(model["best_by"], model["best_by"])))
    facts += prefix_facts(model)
    if model.get("separate_encoders") is not None:
        two = model["separate_encoders"]
        facts.append(("encoders", "one for queries and one for documents" if two else "one for both"))
    if model.get("n_parameters") and model.get("model_bytes"):
        size = f"{count(model['n_parameters'])} parameters, {mebibytes(model['model_bytes'])}"
        facts.append(("size", size))
    if trim:
        facts.append(
            (
                "vocabulary trimmed",
                f"from {count(trim['tokens_before'])} to {count(trim['tokens_after'])} tokens, "
                f"from {mebibytes(trim['bytes_before'])} to {mebibytes(trim['bytes_after'])}",
            )
        )
    return facts


def prefix_facts(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands before the texts, and before those of the untuned model where that was a choice."""
    facts = []
    prompts = {kind: prefix for kind, prefix in (model.get("prompts") or {}).items() if prefix}
    if prompts:
        facts.append(("prefixes", ", ".join(f"{kind} “{prefix}”" for kind, prefix in prompts.items())))
    tried = model.get("untuned_on_dev")
    if tried:
        kept = "the same" if tried["prefixed"] > tried["as_given"] else "its own folder's"
        shares = (
            f"{percent(tried['prefixed'])} of dev pairs in the first 20 with the same, "
            f"{percent(tried['as_given'])} with its own folder's"
        )
        facts.append(("prefixes of the untuned model", f"{kept}, the better: {shares}"))
    return facts


def encoding_facts(encoding: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the documents' vectors were made and what they are like: rows of what and value."""
    facts = []
    rows, checks = encoding.get("rows") or {}, encoding.get("checks") or {}
    if rows.get("rows") is not None:
        facts.append(("vectors", row_words(rows, encoding.get("passage_words"))))
    if encoding.get("precision"):
        facts.append(("precision", encoding["precision"] + guard_words(encoding.get("guard") or {})))
    others = {name: encoding.get(f"precision_{name}") for name in ("untuned", "published")}
    if any(others.values()):
        said = [f"{SYSTEMS[name].lower()} {precision}" for name, precision in others.items() if precision]
        facts.append(("precision of the models it is compared with", ", ".join(said)))
    if encoding.get("texts_a_second"):
        facts.append(("speed", f"{encoding['texts_a_second']:,.0f} texts a second"))
    if checks.get("mean_cosine") is not None:
        facts.append(("mean cosine of two random documents", figure(checks["mean_cosine"])))
    if checks.get("drift"):
        facts.append(("neighbours kept since the version before", drift_words(checks["drift"])))
    return facts


def row_words(rows: Mapping[str, int], passage_words: int | None) -> str:
    """How many vectors there are, and where they come from."""
    passages = f" passages of {count(rows['documents'])} documents" if passage_words else ""
    ways = {
        "encoded": "encoded",
        "copied": "copied from the version before",
        "equal": "copied from a document with the same text",
    }
    said = [f"{count(rows[name])} {words}" for name, words in ways.items() if rows.get(name)]
    gone = rows.get("deleted")
    further = f"; {count(gone)} documents of the version before are gone" if gone else ""
    return f"{count(rows['rows'])}{passages}: {', '.join(said)}{further}"


def guard_words(guard: Mapping[str, Any]) -> str:
    """What the faster precisions were found to lose, or why none was tried."""
    if guard.get("reason"):
        return f": {guard['reason']}"
    tried = [f"{percent(one['recall_at_10'])} with {one['precision']}" for one in guard.get("tried") or []]
    if not tried:
        return ""
    wanted = f"; {percent(guard['needed'])} are wanted" if guard.get("needed") else ""
    when = "; measured for an earlier version" if guard.get("carried") else ""
    return (
        f": of the ten nearest that float32 finds among {count(guard['n_sample'])} documents, "
        f"{' and '.join(tried)} are found{wanted}{when}"
    )


def drift_words(drift: Mapping[str, Any]) -> str:
    """The share of unchanged documents' neighbours that are still theirs, and who was asked."""
    model = "the same model" if drift["same_encoder"] else "another model or other settings"
    return (
        f"{percent(drift['neighbours_kept'])} of the ten nearest, of {count(drift['n_queries'])} documents "
        f"among {count(drift['n_documents'])} whose text is unchanged, by {model}"
    )


def cut_words(encoding: Mapping[str, Any]) -> list[str]:
    """What of the texts the model did not see: a sentence each, none where it saw all."""
    seen, in_passages = encoding.get("seen") or {}, bool(encoding.get("passage_words"))
    n, n_cut, n_unknown = (seen.get(name) or 0 for name in ("of", "cut", "unknown_only"))
    n_others = ((encoding.get("rows") or {}).get("rows") or n) - n
    sentences = []
    if n_cut:
        what = "passages" if in_passages else "documents"
        tokens = f" ({count(encoding['max_seq_length'])} tokens)" if encoding.get("max_seq_length") else ""
        sentence = (
            f"{count(n_cut)} of {count(n)} {what} ({percent(n_cut / n)}) are longer than the model reads"
            f"{tokens}, and are not found by what stands behind that."
        )
        if n_cut / n > MANY_CUT:
            smaller = "a smaller " if in_passages else ""
            sentence += f" Set {smaller}encode.passage_words: then all of it is read."
        sentences.append(sentence)
    if n_unknown:
        sentences.append(
            f"{count(n_unknown)} of {count(n)} texts hold nothing that the model knows, such as emoji alone "
            "or a script that it was not trained on: their vectors say nothing."
        )
    if sentences and n_others > 0:
        sentences.append(f"Whether the other {count(n_others)} are among these was not recorded.")
    return sentences


def contract_words(index: Mapping[str, Any]) -> list[str]:
    """What the index reaches beside what its contract asks for: of recall, latency and memory."""
    contract = index["contract"]
    batched = contract["requests"] == "batched"
    if contract["recall_at_k"] is None:
        sentences = ["Its recall was not measured: there are no held-out queries."]
    else:
        sentences = [recall_words(contract)]
        if contract["met"] and contract["interval"]["low"] < contract["target_recall"]:
            sentences.append("The interval reaches below the target: other queries may find it missed.")
    if contract["latency_ms"] is not None:
        how = "In batches, a query takes" if batched else "Of single queries 95 in 100 take at most"
        limit = limit_words("index.target_latency_ms", contract["target_latency_ms"], "ms")
        sentences.append(f"{how} {contract['latency_ms']:.3g} ms; {limit}.")
    if contract["served_mib"] is not None:
        limit = limit_words("index.memory_mib", contract["memory_mib"], "MiB")
        sentences.append(f"Loaded and asked, it takes {contract['served_mib']:,.0f} MiB of memory; {limit}.")
    return sentences


def recall_words(contract: Mapping[str, Any]) -> str:
    """The share of the truly nearest that is returned, for the queries that are served worst."""
    worst = ", the kind of queries that it serves worst" if len(contract["kinds"]) > 1 else ""
    return (
        f"Of the {count(contract['k'])} truly nearest documents the index returns "
        f"{percent(contract['recall_at_k'])} (95 % interval {interval(contract['interval'])}) for "
        f"{ASKED[contract['kind']]}{worst}; index.target_recall asks for "
        f"{percent(contract['target_recall'])}. This was measured on {count(contract['n_queries'])} test "
        "queries, by which no setting was chosen."
    )


def limit_words(setting: str, limit: float | None, unit: str) -> str:
    return f"{setting} sets no limit" if limit is None else f"{setting} allows {limit:,g} {unit}"


def layer_words(index: Mapping[str, Any]) -> str:
    """What kind of index answers, over how much."""
    n_rows = index.get("n_rows", index["n_documents"])
    passages = f" in {count(n_rows)} passages" if n_rows != index["n_documents"] else ""
    over = f"{count(index['n_documents'])} documents{passages}"
    if index["layer"] == "exact":
        return f"The index is exact: it compares a query with all {over}."
    built = " by tfrs's own layer" if index["layer"] == "tfrs" else ""
    return (
        f"The index is ScaNN's{built}, over {over}: a tree of leaves, of which a query opens the nearest. "
        "What is nearest there by short codes, the candidates, is scored again by the stored rows."
    )


def index_facts(index: Mapping[str, Any], latency: Mapping[str, float] | None) -> list[tuple[str, str]]:
    """How the index was built and what it takes: rows of what and value, of what the report says."""
    settings = index["settings"]
    facts = [("why this index", index["reason"])] if index.get("reason") else []
    if settings.get("num_leaves"):
        facts.append(("leaves", leaf_words(settings)))
    if settings.get("num_reordering_candidates"):
        facts.append(("candidates scored again", count(settings["num_reordering_candidates"])))
    if settings.get("quantize_reordering"):
        stored = index.get("stored_recall")
        lost = f"; exact search over them finds {percent(stored)}" if stored is not None else ""
        facts.append(("rows stored as", settings["quantize_reordering"] + lost))
    if settings.get("anisotropic_quantization_threshold"):
        facts.append(
            ("anisotropic threshold of the codes", f"{settings['anisotropic_quantization_threshold']:.3g}")
        )
    if latency:
        times = ", ".join(f"{latency[p]:.3g} ms ({words})" for p, words in PERCENTILES.items())
        facts.append(("one query at a time", times))
    if index.get("batched_qps"):
        facts.append(("in batches", f"{index['batched_qps']:,.0f} queries a second"))
    if index.get("load_seconds") is not None:
        facts.append(("loading", f"{index['load_seconds']:.1f} s"))
    if index.get("bytes"):
        facts.append(("on disk", mebibytes(index["bytes"])))
    if index.get("not_reproducible"):
        said = index["not_reproducible"]
        facts.append(
            ("not the same when built again", said if isinstance(said, str) else "; ".join(map(str, said)))
        )
    return facts


def leaf_words(settings: Mapping[str, Any]) -> str:
    """How many leaves there are, how many a query opens, and in how many a document lies."""
    searched = settings.get("num_leaves_to_search")
    opened = f", {count(searched)} searched" if searched else ""
    spill = settings.get("spill")
    twice = f"; documents lie in two of them (SOAR, spill {spill:g})" if spill else ""
    return f"{count(settings['num_leaves'])}{opened}{twice}"


def index_groups(index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of recall@k by group; each has what, caption and rows of (words, figures)."""
    words = "language" if index.get("language_by") == "language" else "script"
    tables: list[dict[str, Any]] = [
        {
            "what": words,
            "caption": "By the language of the query's document"
            if words == "language"
            else "By the script of the query's letters",
            "rows": [(group["name"], group) for group in index.get("by_language") or []],
        },
        {
            "what": "popularity",
            "caption": "By the popularity of the query's document",
            "rows": [(POPULARITY[group["name"]], group) for group in index.get("by_popularity") or []],
        },
    ]
    return [table for table in tables if table["rows"]]


def build_rows(index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The builds that were tried, in order, each with the words of its settings."""
    return [
        {
            **build,
            "in_leaves": "two leaves" if build.get("spill") else "one leaf",
            "threshold": "–"
            if build.get("anisotropic_quantization_threshold") is None
            else f"{build['anisotropic_quantization_threshold']:.3g}",
            "chosen": is_built(build, index["settings"]),
        }
        for build in index.get("builds") or []
    ]


def is_built(build: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether this is the build that was made of all documents."""
    return all(build.get(name) == settings.get(name) for name in BUILD_SETTINGS)


def mebibytes(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB"


def curve_points(curve: Mapping[str, Any] | None) -> list[tuple[int, float]]:
    """(training pairs, accuracy at 20) of the learning curve, fewest first; 0 is the untuned model."""
    points = curve["points"] if curve else []
    return sorted((p["pairs"], p["accuracy_at_20"]) for p in points if p["accuracy_at_20"] is not None)


def learning_words(curve: Mapping[str, Any] | None) -> str:
    """Where BM25 is passed, and what the last pairs added."""
    points = [point for point in curve_points(curve) if point[0] > 0]
    if not curve or not points:
        return ""
    sentences = []
    passed = curve.get("passes_bm25_at")
    if passed:
        sentences.append(f"BM25 is passed with {count(passed)} training pairs.")
    elif passed == 0:
        sentences.append("The model is ahead of BM25 before any tuning.")
    elif curve.get("bm25") is not None:
        sentences.append("BM25 is not passed with any of these counts.")
    if len(points) > 1:
        (few, before), (many, after) = points[-2:]
        gain = 100 * (after - before)
        sentences.append(f"From {count(few)} to {count(many)} pairs, accuracy changed by {gain:+.1f} points.")
    return " ".join(sentences)


def similarity_rows(similarity: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row a language: its name, n, models {name: figures}, change of Spearman by tuning, fell."""
    rows = []
    for language, figures in sorted((similarity or {}).items()):
        change = fall_from(figures, "untuned")
        rows.append(
            {
                "language": language,
                "n": figures["n"],
                "models": figures,
                "change": "–" if change is None else f"{change:+.3f}",
                "fell": change is not None and change < -FORGETTING,
            }
        )
    return rows


def fall_from(figures: Mapping[str, Any], other: str) -> float | None:
    """The tuned model's Spearman minus the other's; None where either is missing."""
    now, then = ((figures.get(name) or {}).get("spearman") for name in ("tuned", other))
    # Six decimals, as the figures have: 0.80 - 0.78 is not more than 0.02.
    return None if now is None or then is None else round(now - then, 6)


def forgetting(similarity: Mapping[str, Any]) -> list[str]:
    """Where tuning cost the model what it knew of sentence similarity: a sentence an older model."""
    sentences = []
    for other in ("untuned", "published"):
        changes = {language: fall_from(figures, other) for language, figures in sorted(similarity.items())}
        measured = {language: change for language, change in changes.items() if change is not None}
        fallen = [
            f"{language} ({figure(similarity[language][other]['spearman'])} to "
            f"{figure(similarity[language]['tuned']['spearman'])})"
            for language, change in measured.items()
            if change < -FORGETTING
        ]
        if measured:
            where = f"in {', '.join(fallen)}: forgetting shows there" if fallen else "in no language"
            sentences.append(f"Against {OTHERS[other]}, Spearman fell by more than {FORGETTING} {where}.")
    return sentences


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
            "learning": learning_plot(report),
            "recall": recall_plot(report),
            "memory": memory_plot(report),
            "map_before": map_plot(report, "before"),
            "map_after": map_plot(report, "after"),
        }


def accuracy_plot(report: Mapping[str, Any]) -> "Markup | None":
    retrieval = report["retrieval"]
    if retrieval["tuned"] is None:
        return None
    systems = present(retrieval)
    few = len(systems) <= 3
    with canvas(3.0 if few else 3.8) as (drawn, axes):
        for place, (name, words) in enumerate(systems.items()):
            look = OF_SYSTEM[name]
            aside = 0.12 * (place - (len(systems) - 1) / 2)
            at = [position + aside for position in range(len(CUTOFFS))]
            bounds = [retrieval["intervals"][f"{name}_at_{k}"] for k in CUTOFFS]
            values = [100 * b["mean"] for b in bounds]
            reach = [[100 * abs(b[end] - b["mean"]) for b in bounds] for end in ("low", "high")]
            axes.errorbar(
                at, values, yerr=reach, fmt=MARKERS[look], color=COLOURS[look], capsize=3, label=words
            )
        axes.set_xticks(range(len(CUTOFFS)), [f"first {k}" for k in CUTOFFS])
        axes.set_ylabel("found, % of pairs")
        axes.set_ylim(bottom=0)
        if few:
            axes.legend(loc="upper left")
        else:  # inside the plot it would cover the points
            axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2, fontsize=9)
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


def learning_plot(report: Mapping[str, Any]) -> "Markup | None":
    curve = report["model"].get("learning_curve")
    points = curve_points(curve)
    trained = [point for point in points if point[0] > 0]
    if not curve or not trained:
        return None
    with canvas(3.0) as (drawn, axes):
        counts, shares = zip(*trained, strict=True)
        axes.plot(
            counts, [100 * share for share in shares], "-o", color=COLOURS[0], ms=5, label=SYSTEMS["tuned"]
        )
        # A log axis has no zero: the model without pairs is a line, as BM25 is.
        flat = {"untuned": dict(points).get(0), "bm25": curve.get("bm25")}
        for name, dash in (("untuned", "--"), ("bm25", ":")):
            share = flat[name]
            if share is not None:
                axes.axhline(100 * share, color=COLOURS[OF_SYSTEM[name]], ls=dash, label=SYSTEMS[name])
        axes.set_xscale("log")
        axes.set_xticks(apart(counts), [count(n) for n in apart(counts)])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("training pairs")
        axes.set_ylabel("in the first 20, % of dev pairs")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    words = "Share of dev pairs found in the first 20 against the number of training pairs, with BM25"
    return svg(drawn, "learning", alt(report, words))


def apart(counts: Sequence[int]) -> list[int]:
    """Those of the rising counts whose labels have room on a log axis; the largest always."""
    shown: list[int] = []
    for n in reversed(counts):
        if not shown or 1.5 * n <= shown[0]:
            shown.insert(0, n)
    return shown


def recall_plot(report: Mapping[str, Any]) -> "Markup | None":
    """Recall against queries a second, of the settings that a request may choose."""
    from matplotlib.ticker import LogLocator, NullLocator

    contract, frontier = report["index"]["contract"], report["index"].get("frontier") or []
    modes = {"single_qps": ("one query at a time", 0), "batched_qps": ("in batches", 1)}
    points = {
        mode: sorted(
            (point for point in frontier if point[mode] and point["recall_at_k"] is not None),
            key=lambda point: point["recall_at_k"],
        )
        for mode in modes
    }
    if not any(points.values()):
        return None
    with canvas(3.4) as (drawn, axes):
        for mode, (words, look) in modes.items():
            rates = [point[mode] for point in points[mode]]
            recalls = [point["recall_at_k"] for point in points[mode]]
            reach = [
                [abs(point["interval"][end] - point["recall_at_k"]) for point in points[mode]]
                for end in ("low", "high")
            ]
            style: dict[str, Any] = {"color": COLOURS[look], "marker": MARKERS[look], "ms": 4, "lw": 1.2}
            if rates:
                axes.errorbar(rates, recalls, yerr=reach, fmt="none", ecolor=COLOURS[look], elinewidth=0.8)
                axes.plot(rates, recalls, label=words, **style)
        shipped = [
            (point[mode], point["recall_at_k"])
            for mode in modes
            for point in points[mode]
            if point["shipped"]
        ]
        if shipped:
            axes.plot(*zip(*shipped, strict=True), "*", color=COLOURS[4], ms=14, zorder=3, label="shipped")
        target_line(axes, contract)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("queries a second")
        axes.set_ylabel(f"recall@{contract['k']}")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, fontsize=9, columnspacing=1.2)
    words = f"Recall@{contract['k']} against queries a second, the shipped setting and the target"
    return svg(drawn, "recall", alt(report, words))


def memory_plot(report: Mapping[str, Any]) -> "Markup | None":
    """Recall against the memory of the builds that were tried, each on its largest sample."""
    from matplotlib.ticker import MaxNLocator

    index = report["index"]
    contract = index["contract"]
    tried = [build for build in build_rows(index) if build["recall"] is not None and build["memory_mib"]]
    last = {tuple(build[name] for name in BUILD_SETTINGS): build for build in tried}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for build in last.values():
        groups.setdefault((build["quantize_reordering"], build["in_leaves"]), []).append(build)
    if len(last) < 2:
        return None
    with canvas(3.4) as (drawn, axes):
        for (storage, leaves), builds in sorted(groups.items(), key=lambda of: STORAGES.index(of[0][0])):
            look = STORAGES.index(storage)
            points = [(build["memory_mib"], build["recall"]) for build in builds]
            axes.plot(
                *zip(*points, strict=True),
                MARKERS[look],
                color=COLOURS[look],
                fillstyle="full" if leaves == "two leaves" else "none",
                ls="",
                label=f"{storage}, {leaves}",
            )
        chosen = [(build["memory_mib"], build["recall"]) for build in last.values() if build["chosen"]]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), "*", color=COLOURS[4], ms=14, zorder=3, label="built")
        if contract["memory_mib"]:
            axes.axvline(contract["memory_mib"], color=INK, ls="--", lw=1.2, label="index.memory_mib")
        target_line(axes, contract)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("memory when served, MiB (estimated for all documents)")
        axes.set_ylabel(f"recall@{contract['k']} on the sample")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2, fontsize=9)
    words = f"Recall@{contract['k']} on a sample against the memory of the builds that were tried"
    return svg(drawn, "memory", alt(report, words))


def target_line(axes: "Axes", contract: Mapping[str, Any]) -> None:
    target = contract["target_recall"]
    axes.axhline(target, color=INK, ls=":", lw=1.2, label=f"target {target:g}")


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
