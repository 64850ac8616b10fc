"""``/metrics`` for Prometheus. Metrics that vLLM has too bear vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from skipkernels.decoding.cache_status import CacheStatus
from skipkernels.modality.job import JobAnswer
from skipkernels.server.http.backend import Status
from skipkernels.server.http.dialect import completions_of

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """The metrics of one server; several servers in a process have separate ones."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._backend = _BackendCollector()
        self._registry.register(self._backend)
        counter, histogram = self._counter, self._histogram
        self._succeeded = counter("request_success", "Requests answered.", "finished_reason")
        self._errors = counter("request_errors", "Requests answered with an error.", "status", "code")
        self._disconnected = counter("request_disconnected", "Requests whose client disconnected before the answer.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens.")
        self._new_tokens = counter("generation_tokens", "Generated tokens.")
        self._goodput = counter("requests_in_time", "Jobs answered within their deadline, or without one.")
        self._bytes_not_read = counter("weight_bytes_not_read", "Bytes of weights that skipping has left unread.")
        self._time_to_first = histogram("time_to_first_token_seconds", "From acceptance to the first token.", _SECONDS)
        self._gap = histogram("inter_token_latency_seconds", "Between two tokens of an answer.", _TOKEN_SECONDS)
        self._end_to_end = histogram("e2e_request_latency_seconds", "From acceptance to the answer.", _SECONDS)
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "End-to-end latency divided by the generated tokens.",
            _TOKEN_SECONDS,
            "strategy",
        )
        self._skip_ratio = Gauge(
            "skipkernels:ffn_skip_ratio",
            "FFN bytes not read, over layers x all tokens generated with a strategy.",
            ["strategy"],
            registry=self._registry,
        )
        self._skipped: dict[str, tuple[float, int]] = {}  # strategy -> (skip ratio x tokens, tokens)

    def answered(self, job_answer: JobAnswer) -> None:
        self._goodput.inc(job_answer.deadline_met)
        self._end_to_end.observe(job_answer.time_ms / 1e3)
        for answer, completion in zip(job_answer.answers, completions_of(job_answer), strict=True):
            strategy = answer.strategy.name
            self._succeeded.labels(completion.finish_reason).inc()
            self._prompt_tokens.inc(completion.prompt_tokens)
            self._new_tokens.inc(completion.new_tokens)
            self._per_token.labels(strategy).observe(job_answer.time_ms / 1e3 / max(1, completion.new_tokens))
            if completion.after_first_ms is not None:
                self._time_to_first.observe(max(0.0, answer.time_ms - completion.after_first_ms) / 1e3)
            for gap_ms in completion.gaps_ms:
                self._gap.observe(gap_ms / 1e3)
            self._bytes_not_read.inc(completion.bytes_not_read)
            ratio_sum, tokens = self._skipped.get(strategy, (0.0, 0))
            ratio_sum += completion.skip_ratio * completion.new_tokens
            tokens += completion.new_tokens
            self._skipped[strategy] = ratio_sum, tokens
            self._skip_ratio.labels(strategy).set(ratio_sum / max(1, tokens))

    def failed(self, status: int, code: str) -> None:
        self._errors.labels(str(status), code).inc()

    def disconnected(self) -> None:
        self._disconnected.inc()

    def render(self, status: Status) -> bytes:
        """In Prometheus's text format."""
        self._backend.status = status
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"skipkernels:{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"skipkernels:{name}", text, labels, buckets=buckets, registry=self._registry)


class _BackendCollector(Collector):
    """Exports the scheduler's own counters, which may come from another process."""

    def __init__(self) -> None:
        self.status: Status | None = None

    def collect(self) -> Iterator[Metric]:
        if self.status is None:
            return
        counters, waiting = self.status.counters, self.status.waiting_requests
        for name, text, value in (
            ("num_requests_waiting", "Requests in the queue.", waiting),
            ("num_requests_running", "Requests that are being answered.", self.status.running_requests),
            ("num_workers", "Requests, or batches, that can run at the same time.", self.status.workers),
        ):
            yield GaugeMetricFamily(f"skipkernels:{name}", text, value)
        for name, text, value in (
            ("jobs_accepted", "Jobs accepted.", counters.accepted),
            ("jobs_refused", "Jobs refused on arrival.", counters.refused),
            ("jobs_failed", "Jobs accepted and not answered: failed, or cancelled.", counters.failed),
            ("deadline_violations", "Jobs answered past their deadline.", counters.violations),
            ("batches", "Batches started.", counters.batches),
            ("request_retries", "Requests that were retried.", counters.retried_requests),
            ("raised_levels", "Running requests that took a cheaper strategy to be in time.", counters.raised_levels),
        ):
            yield CounterMetricFamily(f"skipkernels:{name}", text, value)
        yield from self._of_cache(self.status.cache)
        by_strategy = CounterMetricFamily(
            "skipkernels:requests_by_strategy", "Requests answered with a strategy.", labels=["strategy"]
        )
        for strategy, count in sorted(counters.requests_by_strategy.items()):
            by_strategy.add_metric([strategy], count)
        yield by_strategy

    @staticmethod
    def _of_cache(cache: CacheStatus | None) -> Iterator[Metric]:
        if cache is None:
            return
        for name, text, value in (
            ("cache_blocks", "Blocks of the key/value cache.", cache.blocks),
            ("cache_blocks_used", "Blocks that running requests hold.", cache.used),
            ("cache_blocks_shared", "Blocks that several running requests hold.", cache.shared),
            ("cache_blocks_idle", "Blocks kept for prompts that begin alike.", cache.idle),
        ):
            yield GaugeMetricFamily(f"skipkernels:{name}", text, value)
        for name, text, value in (
            ("cache_evictions", "Idle blocks given to somebody else.", cache.evictions),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", cache.prefix_hits),
            ("prefix_cache_queries", "Prompt tokens looked up in the cache.", cache.prefix_queries),
            ("num_preemptions", "Running requests that gave their blocks back for a while.", cache.preemptions),
        ):
            yield CounterMetricFamily(f"skipkernels:{name}", text, value)
