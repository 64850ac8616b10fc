"""/metrics tells what happened, and only of its own server."""

import asyncio
import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

import skipkernels
from skipkernels.decoding.cache_status import CacheStatus
from tests.server.http.fakes import COMPLETIONS, EchoModel, body, client_of, echo_service

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name.removeprefix("skipkernels:"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happened() -> None:
    async def exchange() -> Samples:
        async with client_of(echo_service(EchoModel())) as client:
            await client.post(COMPLETIONS, json=body(min_accuracy=0.75))
            await client.post(COMPLETIONS, json=body(min_accuracy=0.75, stream=True, max_tokens=2))
            await client.post(COMPLETIONS, json=body(deadline_ms=2800, stream=True))
            await client.post(COMPLETIONS, json=body(deadline_ms=1e-3))
            await client.post(COMPLETIONS, json=body("stumble"))
            await client.post(COMPLETIONS, json=body("fail"))
            await client.post(COMPLETIONS, json=body(min_accuracy=1))
            await client.post(COMPLETIONS, content=b"{", headers={"content-type": "application/json"})
            return parse((await client.get("/metrics")).text)

    samples = asyncio.run(exchange())

    def value(name: str, **labels: str) -> float:
        return samples[name, tuple(sorted(labels.items()))]

    assert value("num_requests_running") == value("num_requests_waiting") == 0
    assert value("num_workers") == 1
    assert value("jobs_accepted_total") == 6
    assert value("jobs_refused_total") == value("jobs_failed_total") == 1
    assert value("deadline_violations_total") == 1
    assert value("request_retries_total") == 2
    assert value("batches_total") == 8
    assert value("request_success_total", finished_reason="stop") == 4
    assert value("request_success_total", finished_reason="length") == 1
    assert value("request_errors_total", status="500", code="job_failed") == 1
    assert value("request_errors_total", status="400", code="accuracy_unreachable") == 1
    assert value("request_errors_total", status="400", code="invalid_request") == 1
    assert value("prompt_tokens_total") == 3 + 3 + 3 + 3 + 1
    assert value("generation_tokens_total") == 3 + 2 + 3 + 3 + 1
    assert value("e2e_request_latency_seconds_count") == 5
    assert sum(count for (name, _), count in samples.items() if "per_output_token_seconds_count" in name) == 5
    assert value("request_time_per_output_token_seconds_count", strategy="text@0.5") >= 1
    assert value("time_to_first_token_seconds_count") == 5
    assert value("requests_in_time_total") == 4
    by_strategy = {dict(labels)["strategy"]: count for (name, labels), count in samples.items() if "by_strat" in name}
    assert sum(by_strategy.values()) == 5
    assert by_strategy["text@0.5"] >= 1
    assert value("ffn_skip_ratio", strategy="text@0.5") == 0.5
    assert value("ffn_skip_ratio", strategy="text@0") == 0.0


def test_what_waits_and_runs_is_shown_while_it_does() -> None:
    async def exchange() -> Samples:
        model = EchoModel(word_s=0.2)
        async with client_of(echo_service(model)) as client:
            first = asyncio.create_task(client.post(COMPLETIONS, json=body()))
            while not model.batches:
                await asyncio.sleep(0.01)
            later = [asyncio.create_task(client.post(COMPLETIONS, json=body())) for _ in range(3)]
            while len(asyncio.all_tasks()) < 8:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            samples = parse((await client.get("/metrics")).text)
            await asyncio.gather(first, *later)
            return samples

    samples = asyncio.run(exchange())
    assert samples["num_requests_running", ()] == 1
    assert samples["num_requests_waiting", ()] == 3


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    async def exchange() -> str:
        service = echo_service(EchoModel())
        service.backend._cache = lambda: CacheStatus(*range(8))  # type: ignore[attr-defined]
        async with client_of(service) as client:
            await client.post(COMPLETIONS, json=body())
            await client.post(COMPLETIONS, content=b"{", headers={"content-type": "application/json"})
            return (await client.get("/metrics")).text

    there = {name for name, _ in parse(asyncio.run(exchange()))}
    dashboard = json.loads((Path(skipkernels.__file__).parent / "server" / "grafana_dashboard.json").read_text())
    shown = {name for panel in dashboard["panels"] for name in re.findall(r"skipkernels:(\w+)", json.dumps(panel))}
    assert len(shown) > 15
    assert shown <= there
