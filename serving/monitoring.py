"""What the server counts and times, and the page that Prometheus reads.

TensorFlow Serving's own metrics come first, in the very form of its exporter (r2.11,
util/prometheus_exporter.cc), which prometheus_client cannot print: no HELP lines, a TYPE line for what has no
values yet, histograms whose `le` means "less than", and sums of six digits. The rest is printed by
prometheus_client, each name beginning with `local_serving_`.

A request costs about a microsecond here: cells are plain numbers under a lock that nobody holds for longer
than an addition.
"""

import re
import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from serving.handles import Loaded, LoadError, Servable
from serving.protocol import VersionStatus

OWN = "local_serving_"
MAX_LABEL_SETS = 1000  # of a metric: clients may ask for any model name, and each new one takes memory;
# models that are served are counted beyond it, else such names would hide them
OTHER = "(other)"
RECENT_ANSWERS = 1000  # that the gauge of recall is over
SHOWN_VERSIONS = 10  # of a model, newest first: a server that reloads every hour has thousands of rows

Labels = tuple[str, ...]


def exponential(scale: float, growth: float, n: int) -> list[float]:
    """Upper limits of a histogram's buckets but the last, which has none."""
    limits = [scale]
    while len(limits) < n:
        limits.append(limits[-1] * growth)
    return limits


MICROSECONDS = exponential(10, 1.8, 33)  # up to about 24 minutes; r2.11, servables/tensorflow/util.cc
SECONDS = exponential(0.0001, 2, 20)  # 0.1 ms to about 52 s
SIZES = exponential(1, 2, 9)  # 1 to 256


class Counter:
    """Sums by label values.

    Attributes:
        always: first label values that have sums of their own even where there are MAX_LABEL_SETS others.
    """

    def __init__(self, name: str, *label_names: str) -> None:
        self.name, self.label_names = name, label_names
        self.always: set[str] = set()
        self._lock = threading.Lock()
        self._sums: dict[Labels, float] = {}

    def add(self, labels: Labels, amount: float = 1) -> None:
        with self._lock:
            sums = self._sums
            if labels not in sums and len(sums) >= MAX_LABEL_SETS and labels[0] not in self.always:
                labels = (OTHER,) * len(labels)
            sums[labels] = sums.get(labels, 0) + amount

    def values(self) -> list[tuple[Labels, float]]:
        """By label values, ascending."""
        with self._lock:
            return sorted(self._sums.items())


class Histogram:
    """Counts of values by label values and by bucket.

    A bucket holds what is less than its limit, as there, or with `inclusive` what is at most its limit.
    """

    def __init__(
        self, name: str, limits: Sequence[float], *label_names: str, inclusive: bool = False
    ) -> None:
        self.name, self.limits, self.label_names = name, limits, label_names
        self._bucket = bisect_left if inclusive else bisect_right
        self._lock = threading.Lock()
        self._cells: dict[Labels, list[float]] = {}  # a count a bucket, then the sum

    def add(self, labels: Labels, value: float, n: int = 1) -> None:
        """Count a value `n` times."""
        bucket = self._bucket(self.limits, value)
        with self._lock:
            cell = self._cells.get(labels) or self._new(labels)
            cell[bucket] += n
            cell[-1] += value * n

    def _new(self, labels: Labels) -> list[float]:
        if len(self._cells) >= MAX_LABEL_SETS:
            labels = (OTHER,) * len(labels)
        return self._cells.setdefault(labels, [0] * (len(self.limits) + 2))

    def values(self) -> list[tuple[Labels, list[int], float]]:
        """By label values, ascending: counts up to each limit and in all, and the sum."""
        with self._lock:
            cells = sorted((labels, list(cell)) for labels, cell in self._cells.items())
        return [(labels, _running_sums(cell[:-1]), cell[-1]) for labels, cell in cells]


class Monitoring:
    """Every number of the server. Safe to use from several threads at once."""

    def __init__(self) -> None:
        # TensorFlow Serving's, by its own names
        self._load_attempts = Counter("/tensorflow/cc/saved_model/load_attempt_count", "model_path", "status")
        self._load_latency = Counter("/tensorflow/cc/saved_model/load_latency", "model_path")
        self._requests = Counter("/tensorflow/serving/request_count", "model_name", "status")
        self._request_latency = Histogram(
            "/tensorflow/serving/request_latency", MICROSECONDS, "model_name", "API", "entrypoint"
        )
        self._runtime_latency = Histogram(
            "/tensorflow/serving/runtime_latency", MICROSECONDS, "model_name", "API", "runtime"
        )
        # this server's
        self._batch_size = Histogram("batch_size", SIZES, "model_name", "signature_name", inclusive=True)
        self._queue_seconds = Histogram(
            "queue_seconds", SECONDS, "model_name", "signature_name", inclusive=True
        )
        self._refused = Counter("refused", "reason")
        self._shadowed = Counter("shadow_requests", "model_name", "outcome")
        self._recall = _Recall()
        self._load_seconds: dict[tuple[str, int], float] = {}
        self._queue_length: Callable[[], int] = lambda: 0
        self._states: Callable[[], Mapping[str, Sequence[VersionStatus]]] = dict
        self._registry = CollectorRegistry()
        self._registry.register(_Own(self._own))
        ProcessCollector(namespace=OWN.rstrip("_"), registry=self._registry)

    # What happens

    def request(self, model_name: str, status: str, api: str, entrypoint: str, seconds: float) -> None:
        """One request was answered.

        Args:
            status: TensorFlow's name of its code; the time of what is not OK is not kept, as there.
            api: "predict" over REST, "Predict" over gRPC, and so on, as there.
            entrypoint: "REST" or "GRPC".
        """
        self._requests.add((model_name, status))
        if status == "OK":
            self._request_latency.add((model_name, api, entrypoint), int(seconds * 1e6))

    def batch(
        self,
        model_name: str,
        signature_name: str,
        queue_seconds: Sequence[float],
        seconds: float,
        n_answered: int,
    ) -> None:
        """Some requests were searched as one.

        Args:
            queue_seconds: each request's time in the queue.
            seconds: of the search itself.
            n_answered: of them, by no error.
        """
        labels = model_name, signature_name
        self._batch_size.add(labels, len(queue_seconds))
        for waited in queue_seconds:
            self._queue_seconds.add(labels, waited)
        if n_answered:  # predict_util.cc times Session::Run where it succeeds
            self._runtime_latency.add((model_name, "Predict", "TF1"), int(seconds * 1e6), n_answered)

    def refused(self, reason: str) -> None:
        """A request was not searched: the queue is "full", it is too "late", or the client is "gone"."""
        self._refused.add((reason,))

    def loaded(self, loaded: Loaded, seconds: float) -> None:
        """A version became AVAILABLE; for `Models(on_load=...)`."""
        self._requests.always.add(loaded.model_name)
        self._load_seconds[loaded.model_name, loaded.version] = seconds
        if len(self._load_seconds) > MAX_LABEL_SETS:
            del self._load_seconds[next(iter(self._load_seconds))]

    def timing_loads(self, open_version: Callable[[Path], Servable]) -> Callable[[Path], Servable]:
        """The same function, counted and timed as LoadSavedModel is there; for `Models`."""

        def open_timed(folder: Path) -> Servable:
            started = time.perf_counter()
            try:
                servable = open_version(folder)
            except LoadError:
                self._load_attempts.add((str(folder), "fail"))
                raise
            self._load_attempts.add((str(folder), "success"))
            self._load_latency.add((str(folder),), int((time.perf_counter() - started) * 1e6))
            return servable

        return open_timed

    def shadowed(self, model_name: str, outcome: str) -> None:
        """An answer was drawn to be checked: "compared", "dropped", "skipped" or "failed"."""
        self._shadowed.add((model_name, outcome))

    def recall(
        self, model_name: str, version: int, signature_name: str, k: int, hits: int, wanted: int
    ) -> None:
        """One query's answer was compared with the exact one: `hits` of `wanted` results are in it."""
        self._recall.add((model_name, str(version), signature_name, str(k)), hits, wanted)

    # What is asked for when the page is

    def watch_queue(self, length: Callable[[], int]) -> None:
        self._queue_length = length

    def watch_versions(self, states: Callable[[], Mapping[str, Sequence[VersionStatus]]]) -> None:
        """`Models.states`: each model's rows, newest version first."""
        self._states = states

    def exposition(self) -> bytes:
        """The page, text/plain."""
        counters = [self._load_attempts, self._load_latency, self._requests]
        lines = _their_lines([*counters, self._request_latency, self._runtime_latency])
        # What is no UTF-8 would make Prometheus drop the whole page.
        return "\n".join([*lines, ""]).encode(errors="replace") + generate_latest(self._registry)

    def _own(self) -> Iterator[Metric]:
        versions = list(_newest(self._states()))
        recall = [row for row in self._recall.values() if _is_shown(row[0], versions)]
        yield _histogram(self._batch_size, "Requests that were searched as one.")
        yield _histogram(self._queue_seconds, "Seconds from a request's arrival to its search.")
        yield _gauge("queue_length", "Requests that wait.", [((), self._queue_length())])
        yield _counter(self._refused, "Requests that were not searched.")
        yield _gauge(
            "version_state",
            "1 for the state that a version is in.",
            [((name, str(version), state), 1) for name, version, state in versions],
            ("model_name", "version", "state"),
        )
        yield _gauge(
            "load_seconds",
            "Seconds that a version took to load.",
            [
                ((name, str(version)), self._load_seconds[name, version])
                for name, version, _ in versions
                if (name, version) in self._load_seconds
            ],
            ("model_name", "version"),
        )
        yield _gauge(
            "anonymous_memory_bytes", "Memory that is no file's (RssAnon).", [((), anonymous_memory())]
        )
        yield _counter(self._shadowed, "Answers drawn to be compared with the exact ones, by outcome.")
        names = _Recall.label_names
        yield _rows(
            CounterMetricFamily(f"{OWN}shadow_hits", "Exact results that were in the answer.", labels=names),
            [(labels, hits) for labels, hits, *_ in recall],
        )
        yield _rows(
            CounterMetricFamily(f"{OWN}shadow_wanted", "Exact results that were looked for.", labels=names),
            [(labels, wanted) for labels, _, wanted, _ in recall],
        )
        yield _gauge(
            "shadow_recall",
            f"Hits of what was wanted, over the last {RECENT_ANSWERS} answers compared.",
            [(labels, share) for labels, *_, share in recall],
            names,
        )


class _Recall:
    """Hits and wanted results by label values: since the start, and of the last answers."""

    label_names = ("model_name", "version", "signature_name", "k")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[Labels, list[int]] = {}
        self._recent: dict[Labels, deque[tuple[int, int]]] = {}

    def add(self, labels: Labels, hits: int, wanted: int) -> None:
        with self._lock:
            if labels not in self._sums and len(self._sums) >= MAX_LABEL_SETS:
                oldest = next(iter(self._sums))  # a version long gone, or one k of very many
                del self._sums[oldest], self._recent[oldest]
            sums = self._sums.setdefault(labels, [0, 0])
            sums[0] += hits
            sums[1] += wanted
            self._recent.setdefault(labels, deque(maxlen=RECENT_ANSWERS)).append((hits, wanted))

    def values(self) -> list[tuple[Labels, int, int, float]]:
        """Label values, hits, wanted, and the recall of the last answers."""
        with self._lock:
            rows = [(labels, s[0], s[1], list(self._recent[labels])) for labels, s in self._sums.items()]
        return sorted((labels, hits, wanted, _share(recent)) for labels, hits, wanted, recent in rows)


class _Own:
    """This server's metrics as prometheus_client asks for them."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self.collect = collect

    def describe(self) -> list[Metric]:
        return []  # else the registry would collect once just to learn the names


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file holds; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _running_sums(counts: Iterable[float]) -> list[int]:
    total, sums = 0, []
    for count in counts:
        total += int(count)
        sums.append(total)
    return sums


def _share(answers: Sequence[tuple[int, int]]) -> float:
    return sum(hits for hits, _ in answers) / max(1, sum(wanted for _, wanted in answers))


def _newest(states: Mapping[str, Sequence[VersionStatus]]) -> Iterator[tuple[str, int, str]]:
    """(model name, version, state) of the newest few of each model, and whatever is loaded besides."""
    for name, rows in states.items():
        shown = [row for i, row in enumerate(rows) if i < SHOWN_VERSIONS or row.state != "END"]
        yield from ((name, row.version, row.state) for row in shown)


def _is_shown(labels: Labels, versions: Sequence[tuple[str, int, str]]) -> bool:
    """Whether a version's recall is still printed; where nobody tells the versions, all are."""
    return not versions or (labels[0], labels[1]) in {(name, str(version)) for name, version, _ in versions}


# TensorFlow Serving's form


def _their_lines(metrics: Iterable[Counter | Histogram]) -> Iterator[str]:
    for metric in sorted(metrics, key=lambda metric: metric.name):
        name = re.sub(r"[^a-zA-Z0-9_]", ":", metric.name)
        if isinstance(metric, Counter):
            yield f"# TYPE {name} counter"
            yield from (
                f"{name}{{{_their_labels(metric, labels)}}} {value:.0f}" for labels, value in metric.values()
            )
        else:
            yield f"# TYPE {name} histogram"
            yield from _their_histogram(name, metric)


def _their_histogram(name: str, metric: Histogram) -> Iterator[str]:
    for labels, counts, total in metric.values():
        shown = _their_labels(metric, labels)
        limits = [f"{limit:g}" for limit in metric.limits] + ["+Inf"]
        for limit, count in zip(limits, counts, strict=True):
            yield f'{name}_bucket{{{shown},le="{limit}"}} {count}'
        yield f"{name}_sum{{{shown}}} {total:g}"
        yield f"{name}_count{{{shown}}} {counts[-1]}"


def _their_labels(metric: Counter | Histogram, labels: Labels) -> str:
    """A line break is escaped too, which it is not there: it would spoil the page."""
    shown = [value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for value in labels]
    return ",".join(f'{name}="{value}"' for name, value in zip(metric.label_names, shown, strict=True))


# prometheus_client's form


def _counter(counter: Counter, help_text: str) -> Metric:
    family = CounterMetricFamily(OWN + counter.name, help_text, labels=counter.label_names)
    return _rows(family, counter.values())


def _gauge(
    name: str, help_text: str, rows: Iterable[tuple[Labels, float]], label_names: Sequence[str] = ()
) -> Metric:
    return _rows(GaugeMetricFamily(OWN + name, help_text, labels=label_names), rows)


def _rows(
    family: CounterMetricFamily | GaugeMetricFamily, rows: Iterable[tuple[Labels, float]]
) -> CounterMetricFamily | GaugeMetricFamily:
    for labels, value in rows:
        family.add_metric(_printable(labels), value)
    return family


def _histogram(histogram: Histogram, help_text: str) -> Metric:
    family = HistogramMetricFamily(OWN + histogram.name, help_text, labels=histogram.label_names)
    limits = [f"{limit:g}" for limit in histogram.limits] + ["+Inf"]
    for labels, counts, total in histogram.values():
        family.add_metric(_printable(labels), list(zip(limits, counts, strict=True)), total)
    return family


def _printable(labels: Labels) -> list[str]:
    """Without the lone surrogates that stand for bytes that are no UTF-8."""
    return [label.encode(errors="replace").decode() for label in labels]
