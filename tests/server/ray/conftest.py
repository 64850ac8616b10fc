"""A Ray cluster of this machine, for all tests of a module, and services on it."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from skipkernels.server.http.service import Service
from skipkernels.server.ray.loopback import ENVIRONMENT
from tests.server.http.fakes import PROFILE, EchoFormat, EchoModel, client_of

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from skipkernels.server.ray.backend import RayBackend
    from skipkernels.server.ray.cluster import Cluster

ROOT = Path(__file__).resolve().parents[3]
WORD_S = 0.02
os.environ |= ENVIRONMENT  # before anything imports Ray


@pytest.fixture(scope="module")
def cluster() -> "Iterator[Cluster]":
    pytest.importorskip("ray")
    from skipkernels.server.ray.cluster import ray_cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # other processes load the tests' models
        with ray_cluster(cpus=2) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def replicas(cluster: "Cluster") -> "list[DeploymentHandle]":
    return cluster.start_replicas(partial(EchoModel, WORD_S), 2)


@pytest.fixture
def backend(cluster: "Cluster", replicas: "list[DeploymentHandle]") -> "RayBackend":
    """A scheduler for one test: its service closes it."""
    return cluster.start_scheduler(PROFILE, replicas)


def serve(backend: "RayBackend", exercise: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Calls ``exercise`` with a client of a service on ``backend``."""

    async def run() -> None:
        async with client_of(Service(PROFILE, EchoFormat(), backend)) as client:
            client.timeout = httpx.Timeout(100)
            await exercise(client)

    asyncio.run(run())
