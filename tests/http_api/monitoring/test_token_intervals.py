"""The histogram of token intervals counts as the client library's does."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest

from headwater.http_api.monitoring.token_intervals import IntervalHistogram

BUCKETS = (2**-10, 0.25, 1, 5)
durations_s = st.sampled_from([0.0, 2**-12, 2**-10, 0.125, 0.25, 0.5, 1.0, 3.0, 5.0, 6.0, 2.0**30])  # exact in any sum


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), durations_s, st.integers(1, 3))))
def test_page_equals_the_client_librarys(observed: list[tuple[str, float, int]]) -> None:
    disable_created_metrics()
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    reference = Histogram("x:seconds", "Between.", ("model_name",), registry=theirs, buckets=BUCKETS)
    histogram = IntervalHistogram("x:seconds", "Between.", "model_name", buckets=BUCKETS)
    ours.register(histogram)
    for model_name, value, count in observed:
        histogram.labels(model_name).add(value, count)
        for _ in range(count):
            reference.labels(model_name).observe(value)
    assert sorted(generate_latest(ours).splitlines()) == sorted(generate_latest(theirs).splitlines())
