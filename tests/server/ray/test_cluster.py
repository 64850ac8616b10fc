"""The server over a real Ray cluster: the same answers, from other processes of this machine and from no other one."""

import asyncio
import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from skipkernels.errors import DeviceError
from skipkernels.modality.errors import ProfileError
from skipkernels.modality.profile import Profile
from tests.server.http.fakes import COMPLETIONS, PROFILE, REACHABLE, STRATEGIES, EchoModel, body
from tests.server.http.media import audio_part, image_part, text_part
from tests.server.ray.conftest import serve
from tests.server.ray.processes import addresses, below, replicas_of

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from skipkernels.server.ray.backend import RayBackend
    from skipkernels.server.ray.cluster import Cluster


def test_the_same_answers_as_without_a_cluster(backend: "RayBackend") -> None:
    async def exercise(client: httpx.AsyncClient) -> None:
        async def post(**fields: Any) -> httpx.Response:
            return await client.post(COMPLETIONS, json=body(**fields))

        whole = (await post(min_accuracy=0.75)).json()
        assert whole["choices"][0]["message"]["content"] == "one two three "
        assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
        assert whole["skipkernels"]["strategy"] == "text@0"

        stream = (await post(stream=True)).text
        assert stream.endswith("data: [DONE]\n\n")
        assert all(stream.count(f'"content":"{word} "') == 1 for word in ("one", "two", "three"))
        stumbled = (await post(text="stumble and go on", stream=True)).text
        assert stumbled.count('"content":"stumble "') == 1
        assert '"retried":true' in stumbled

        parts = [text_part(), image_part(), audio_part()]
        assert (await post(text=parts, min_accuracy=0.99)).json()["skipkernels"]["strategy"] == "audio+image+text@0"

        refused = await post(min_accuracy=1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "accuracy_unreachable")
        assert f"at most {math.floor(REACHABLE * 1e4) / 1e4:.4f} can" in refused.json()["error"]["message"]
        failed = await post(text="fail")
        assert failed.status_code == 500
        assert "it was told to fail" in failed.json()["error"]["message"]

        answers = await asyncio.gather(*(post(text=f"number {number}") for number in range(40)))
        said = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
        assert said == [f"number {number} " for number in range(40)]

        metrics = (await client.get("/metrics")).text
        assert "num_workers 2.0" in metrics
        assert "jobs_accepted_total 45.0" in metrics
        assert (await client.get("/health")).status_code == 200

    serve(backend, exercise)


def test_nobody_elsewhere_can_reach_it_or_hears_of_it(replicas: "list[DeploymentHandle]") -> None:
    from ray._common.usage.usage_lib import usage_stats_enabled

    assert not usage_stats_enabled()
    processes = below()
    assert len([command for command in processes.values() if "ray::ServeReplica" in command]) >= 2
    sockets = addresses({os.getpid(), *processes})
    assert len(sockets) > 10
    assert set(sockets) == {"127.0.0.1"}


def test_a_replica_tells_what_it_serves(cluster: "Cluster", replicas: "list[DeploymentHandle]") -> None:
    description = cluster.describe(replicas[1])
    assert (description.name, description.fingerprint, description.device) == ("echo", "echo-1", "cpu")
    assert description.strategies == STRATEGIES
    PROFILE.check(description)  # type: ignore[arg-type]  # a replica stands for its model


def process_as_profile(model: EchoModel) -> Profile:
    """Stands for a measurement."""
    return dataclasses.replace(PROFILE, source=f"{model.name} in process {os.getpid()}")


def test_a_model_is_profiled_where_it_runs(cluster: "Cluster", replicas: "list[DeploymentHandle]") -> None:
    source = cluster.profile(replicas[0], process_as_profile).source
    assert source == f"echo in process {replicas_of('replica-0')[0]}"


def refuse_to_measure(model: EchoModel) -> Profile:
    raise ProfileError(f"{model.name} has no samples")


def test_what_a_measurement_raises_is_raised_here(cluster: "Cluster", replicas: "list[DeploymentHandle]") -> None:
    with pytest.raises(ProfileError) as raised:
        cluster.profile(replicas[0], refuse_to_measure)
    assert str(raised.value) == "echo has no samples", "pages of another process"


def no_model() -> EchoModel:
    raise ValueError("there is no such model")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_an_error(cluster: "Cluster") -> None:
    with pytest.raises(DeviceError, match="Replica did not start on Ray: ValueError: there is no such model"):
        cluster.start_replicas(no_model, 1)
