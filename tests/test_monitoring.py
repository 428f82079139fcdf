"""The page for Prometheus: TensorFlow Serving's metrics in its own form, and this server's."""

import threading
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from searching_parts import TinyIndex, loaded

from serving import monitoring
from serving.handles import LoadError
from serving.monitoring import Counter, Histogram, Monitoring, exponential
from serving.protocol import VersionStatus

# Expected lines follow r2.11, util/prometheus_exporter.cc and servables/tensorflow/util.cc


def lines(made: Monitoring) -> list[str]:
    return made.exposition().decode().splitlines()


ORDER = ("model_name", "version", "signature_name", "k", "state", "le")


def own(made: Monitoring) -> dict[str, float]:
    """This server's samples by name and label values."""
    text = "\n".join(line for line in lines(made) if "local_serving_" in line) + "\n"
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        " ".join(
            [s.name.removeprefix("local_serving_"), *(s.labels[n] for n in ORDER if n in s.labels)]
        ): s.value
        for s in samples
    }


def test_requests_are_counted_by_model_and_code():
    made = Monitoring()
    for status in ("OK", "INVALID_ARGUMENT", "OK"):
        made.request("index", status, "predict", "REST", 0.001)
    page = lines(made)
    start = page.index("# TYPE :tensorflow:serving:request_count counter")
    assert page[start + 1 : start + 3] == [
        ':tensorflow:serving:request_count{model_name="index",status="INVALID_ARGUMENT"} 1',
        ':tensorflow:serving:request_count{model_name="index",status="OK"} 2',
    ]


def test_latency_is_a_histogram_in_microseconds_of_what_was_answered():
    made = Monitoring()
    made.request("index", "OK", "predict", "REST", 20e-6)
    made.request("index", "OK", "predict", "REST", 2e-3)
    made.request("index", "NOT_FOUND", "predict", "REST", 1.0)
    page = lines(made)
    start = page.index("# TYPE :tensorflow:serving:request_latency histogram")
    name = ":tensorflow:serving:request_latency"
    labels = 'model_name="index",API="predict",entrypoint="REST"'
    # limits 10 x 1.8^i: 10, 18, 32.4, 58.32, 104.976, ...; 1.8^9 = 198.36, 1.8^10 = 357.05
    assert page[start + 1 : start + 6] == [
        f'{name}_bucket{{{labels},le="10"}} 0',
        f'{name}_bucket{{{labels},le="18"}} 0',
        f'{name}_bucket{{{labels},le="32.4"}} 1',
        f'{name}_bucket{{{labels},le="58.32"}} 1',
        f'{name}_bucket{{{labels},le="104.976"}} 1',
    ]
    assert f'{name}_bucket{{{labels},le="1983.59"}} 1' in page
    assert f'{name}_bucket{{{labels},le="3570.47"}} 2' in page
    assert page[start + 33 : start + 37] == [
        f'{name}_bucket{{{labels},le="1.47476e+09"}} 2',  # the 33rd: 10 x 1.8^32
        f'{name}_bucket{{{labels},le="+Inf"}} 2',
        f"{name}_sum{{{labels}}} 2020",
        f"{name}_count{{{labels}}} 2",
    ]


def test_a_value_on_a_limit_belongs_to_the_next_bucket_as_there():
    """histogram.cc takes the first limit above the value."""
    histogram = Histogram("/x", exponential(1, 2, 10))
    for value in (2, 20, 200):  # the exporter's own example
        histogram.add((), value)
    assert histogram.values() == [((), [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], 222)]


def test_sums_have_six_digits_as_there():
    made = Monitoring()
    for _ in range(3):
        made.request("index", "OK", "predict", "REST", 0.4115226)
    assert any(line.endswith("} 1.23457e+06") for line in lines(made) if "request_latency_sum" in line)


def test_metrics_come_by_name_each_with_its_type_even_before_it_has_a_value():
    types = [line for line in lines(Monitoring()) if line.startswith("# TYPE :tensorflow")]
    assert types == [
        "# TYPE :tensorflow:cc:saved_model:load_attempt_count counter",
        "# TYPE :tensorflow:cc:saved_model:load_latency counter",
        "# TYPE :tensorflow:serving:request_count counter",
        "# TYPE :tensorflow:serving:request_latency histogram",
        "# TYPE :tensorflow:serving:runtime_latency histogram",
    ]


def test_backslash_quote_and_line_break_in_a_models_name_are_escaped():
    made = Monitoring()
    made.request('a\\b"c\nd', "OK", "predict", "REST", 0)
    assert ':tensorflow:serving:request_count{model_name="a\\\\b\\"c\\nd",status="OK"} 1' in lines(made)


def test_a_name_that_is_no_utf_8_does_not_spoil_the_page():
    made = Monitoring()
    made.request("a\udcff", "NOT_FOUND", "predict", "REST", 0)
    made.batch("a\udcff", "search", [0.0], 0.0, 1)
    made.exposition().decode()


def test_clients_that_ask_for_ever_new_names_take_no_more_memory(monkeypatch):
    monkeypatch.setattr(monitoring, "MAX_LABEL_SETS", 3)
    made = Monitoring()
    for n in range(10):
        made.request(f"model{n}", "OK", "predict", "REST", 0)
    made.request("model0", "OK", "predict", "REST", 0)
    counts = [line for line in lines(made) if line.startswith(":tensorflow:serving:request_count")]
    assert counts == [
        ':tensorflow:serving:request_count{model_name="(other)",status="(other)"} 7',
        ':tensorflow:serving:request_count{model_name="model0",status="OK"} 2',
        ':tensorflow:serving:request_count{model_name="model1",status="OK"} 1',
        ':tensorflow:serving:request_count{model_name="model2",status="OK"} 1',
    ]
    total = [line for line in lines(made) if "request_latency_count" in line]
    assert sum(int(line.rsplit(" ", 1)[1]) for line in total) == 11


def test_a_served_model_is_counted_whatever_names_others_ask_for(monkeypatch):
    monkeypatch.setattr(monitoring, "MAX_LABEL_SETS", 3)
    made = Monitoring()
    made.loaded(loaded(TinyIndex([[1.0]])), 1.5)
    for n in range(10):
        made.request(f"model{n}", "NOT_FOUND", "predict", "REST", 0)
    made.request("index", "INTERNAL", "predict", "REST", 0)
    page = lines(made)
    assert ':tensorflow:serving:request_count{model_name="index",status="INTERNAL"} 1' in page
    assert ':tensorflow:serving:request_count{model_name="(other)",status="(other)"} 7' in page


def test_loads_are_counted_and_timed_by_folder_as_load_saved_model_is_there():
    made = Monitoring()

    def open_version(folder: Path) -> TinyIndex:
        if folder.name == "8":
            raise LoadError("NOT_FOUND", "nothing there")
        return TinyIndex([[1.0]])

    opened = made.timing_loads(open_version)
    assert isinstance(opened(Path("/models/7")), TinyIndex)
    with pytest.raises(LoadError, match="nothing there"):
        opened(Path("/models/8"))
    page = lines(made)
    name = ":tensorflow:cc:saved_model:load_attempt_count"
    assert f'{name}{{model_path="/models/7",status="success"}} 1' in page
    assert f'{name}{{model_path="/models/8",status="fail"}} 1' in page
    latencies = [line for line in page if line.startswith(":tensorflow:cc:saved_model:load_latency{")]
    assert [line.split("}")[0] for line in latencies] == [
        ':tensorflow:cc:saved_model:load_latency{model_path="/models/7"'
    ]


def test_a_batch_counts_its_size_and_each_requests_wait():
    made = Monitoring()
    made.batch("index", "serving_default", [0.0, 0.00015, 0.001], 0.002, 3)
    made.batch("index", "serving_default", [0.0], 0.002, 0)
    found = own(made)
    assert found["batch_size_bucket index serving_default 1"] == 1
    assert found["batch_size_bucket index serving_default 2"] == 1
    assert found["batch_size_bucket index serving_default 4"] == 2
    assert found["batch_size_sum index serving_default"] == 4
    assert found["queue_seconds_bucket index serving_default 0.0001"] == 2
    assert found["queue_seconds_bucket index serving_default 0.0002"] == 3
    assert found["queue_seconds_count index serving_default"] == 4
    assert found["queue_seconds_sum index serving_default"] == pytest.approx(0.00115)
    # what failed has no time there
    labels = 'model_name="index",API="Predict",runtime="TF1"'
    assert f":tensorflow:serving:runtime_latency_sum{{{labels}}} 6000" in lines(made)


def test_the_page_asks_for_the_queue_and_the_versions_as_they_are_now():
    made = Monitoring()
    waiting, rows = [5], {"index": [VersionStatus(2, "LOADING"), VersionStatus(1, "AVAILABLE")]}
    made.watch_queue(lambda: waiting[0])
    made.watch_versions(lambda: rows)
    made.loaded(loaded(TinyIndex([[1.0]]), version=1), 1.5)
    found = own(made)
    assert found["queue_length"] == 5
    assert found["version_state index 2 LOADING"] == found["version_state index 1 AVAILABLE"] == 1
    assert found["load_seconds index 1"] == 1.5
    waiting[0] = 0
    rows["index"][0] = VersionStatus(2, "AVAILABLE")
    found = own(made)
    assert found["queue_length"] == 0
    assert "version_state index 2 LOADING" not in found


def test_of_many_versions_the_newest_are_shown_and_what_is_loaded():
    made = Monitoring()
    rows = [VersionStatus(n, "END") for n in range(40, 0, -1)]
    rows[-1] = VersionStatus(1, "AVAILABLE")
    made.watch_versions(lambda: {"index": rows})
    shown = [name for name in own(made) if name.startswith("version_state")]
    assert sorted(shown) == sorted(
        [*(f"version_state index {n} END" for n in range(31, 41)), "version_state index 1 AVAILABLE"]
    )


def test_recall_is_two_counters_and_the_share_of_the_last_answers(monkeypatch):
    monkeypatch.setattr(monitoring, "RECENT_ANSWERS", 2)
    made = Monitoring()
    for hits in (0, 9, 10):
        made.recall("index", 7, "search", 10, hits, 10)
    found = own(made)
    assert found["shadow_hits_total index 7 search 10"] == 19
    assert found["shadow_wanted_total index 7 search 10"] == 30
    assert found["shadow_recall index 7 search 10"] == pytest.approx(0.95)  # of the last two


def test_memory_is_shown():
    found = own(Monitoring())
    assert found["anonymous_memory_bytes"] > 1e6
    assert found["process_resident_memory_bytes"] > 1e6


def test_threads_that_count_at_once_lose_nothing():
    counter, histogram = Counter("/x", "a"), Histogram("/y", [1.0], "a")

    def count() -> None:
        for _ in range(5000):
            counter.add(("b",))
            histogram.add(("b",), 0.5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.values() == [(("b",), 20_000)]
    assert histogram.values() == [(("b",), [20_000, 20_000], 10_000)]


def test_counting_a_request_costs_microseconds():
    made = Monitoring()
    best = min(_seconds_of(made, 1000) for _ in range(5))
    assert best < 1000 * 20e-6  # measured: about 1 us; the bound is for a busy machine


def _seconds_of(made: Monitoring, n: int) -> float:
    started = time.perf_counter()
    for _ in range(n):
        made.request("index", "OK", "predict", "REST", 0.001)
    return time.perf_counter() - started
