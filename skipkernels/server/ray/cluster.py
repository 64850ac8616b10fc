"""Starts Ray, and the deployments of the model's replicas and of the scheduler."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from skipkernels.chat.chat import ChatModel
from skipkernels.errors import DeviceError, SkipkernelsError
from skipkernels.modality.profile import Profile
from skipkernels.modality.scheduler import Admission
from skipkernels.server.ray.backend import RayBackend
from skipkernels.server.ray.events import Description
from skipkernels.server.ray.loopback import ENVIRONMENT, LOOPBACK, on_loopback
from skipkernels.server.ray.replica import Replica
from skipkernels.server.ray.scheduler_deployment import SchedulerDeployment

if TYPE_CHECKING:
    from ray import serve
    from ray.serve.handle import DeploymentHandle

_OBJECT_STORE_BYTES = 256 << 20  # for requests and answers only: weights are not sent through Ray
_HEALTH_S = 1.0
_UNLIMITED = 1 << 20  # requests in a deployment; the HTTP server enforces the limits


@dataclass(frozen=True)
class Resources:
    """What Ray reserves for one replica."""

    cpus: float = 1.0
    gpus: float = 0.0


@contextmanager
def ray_cluster(address: str | None = None, *, cpus: float | None = None) -> Iterator[Cluster]:
    """Joins the cluster at ``address``; without one, starts one on this machine that only this machine can reach.

    Args:
        cpus: of the cluster that is started; None: all.

    Raises:
        SkipkernelsError: Ray is not installed, cannot be reached, or listens beyond this machine.
    """
    if address is None:
        _set_environment()
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise SkipkernelsError(
            f"serving on a cluster needs Ray ({error}): pip install skipkernels[serve,ray], or leave out --ray"
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address or "local", **options)
    except ConnectionError as error:
        raise SkipkernelsError(f"no Ray cluster answers at {address}: {error}") from error
    cluster = Cluster(local=address is None)
    try:
        if cluster.local and ray.util.get_node_ip_address() != LOOPBACK:
            raise SkipkernelsError(f"Ray {ray.__version__} does not stay on {LOOPBACK}; use a release of 2.58")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled")  # clients come to this project's own HTTP server
        yield cluster
    finally:
        cluster.close()
        ray.shutdown()


def _set_environment() -> None:
    missing = {name for name, value in ENVIRONMENT.items() if os.environ.get(name) != value}
    if missing and sys.modules.get("ray"):
        raise SkipkernelsError(
            f"Ray was imported before it was configured to stay on {LOOPBACK}; import it later, or set "
            f"{', '.join(missing)}"
        )
    os.environ |= ENVIRONMENT


class Cluster:
    """This process's deployments on Ray; others on the cluster are not touched."""

    def __init__(self, *, local: bool) -> None:
        self.local = local
        self._prefix = f"skipkernels-{uuid.uuid4().hex[:8]}"
        self._names: list[str] = []

    def start_replicas(
        self, load: Callable[[], ChatModel], count: int, resources: Resources | None = None
    ) -> list[DeploymentHandle]:
        """Loads ``count`` copies of a model, each in a process and a deployment of its own.

        Args:
            load: picklable; the files it reads have to be on every machine of the cluster.

        Raises:
            DeviceError: they did not start.
        """
        reserved = resources or Resources()
        actor = {"num_cpus": reserved.cpus, "num_gpus": reserved.gpus}
        return self._start(Replica, [(f"replica-{number}", (load,)) for number in range(count)], actor)

    def describe(self, replica: DeploymentHandle) -> Description:
        return replica.describe.remote().result()

    def profile(self, replica: DeploymentHandle, measure: Callable[[ChatModel], Profile]) -> Profile:
        """``measure`` of a replica's model, in its process; raises what it raises."""
        from ray.exceptions import RayTaskError

        try:
            return replica.profile.remote(measure).result()
        except RayTaskError as error:
            raise error.cause from error

    def start_scheduler(
        self,
        profile: Profile,
        replicas: Sequence[DeploymentHandle],
        *,
        restart_s: float = 600.0,
        selection: str = "maximize",
        memory_bytes: float | None = None,
        admission: Admission = "accuracy",
    ) -> RayBackend:
        """See ``SchedulerDeployment``."""
        arguments = (profile, list(replicas), restart_s, selection, memory_bytes, admission)
        (scheduler,) = self._start(SchedulerDeployment, [("scheduler", arguments)], {"num_cpus": 0})
        return RayBackend(scheduler)

    def close(self) -> None:
        """Deletes this process's deployments; a cluster that it started ends as a whole."""
        from ray import serve

        while self._names and not self.local:
            serve.delete(self._names.pop())

    def _start(
        self, kind: type[object], applications: Sequence[tuple[str, tuple[Any, ...]]], actor: dict[str, float]
    ) -> list[DeploymentHandle]:
        from ray import serve

        made = serve.deployment(on_loopback(kind) if self.local else kind)
        deployment = cast("serve.Deployment", made).options(
            name=kind.__name__,
            num_replicas=1,
            max_ongoing_requests=_UNLIMITED,
            health_check_period_s=_HEALTH_S,
            ray_actor_options=actor,
        )
        targets = [
            serve.RunTarget(deployment.bind(*arguments), f"{self._prefix}-{name}", route_prefix=None)
            for name, arguments in applications
        ]
        self._names += [target.name for target in targets]
        try:
            return serve.run_many(targets)
        except RuntimeError as error:
            raise DeviceError(f"{kind.__name__} did not start on Ray: {self._why(targets) or error}") from error

    @staticmethod
    def _why(targets: Sequence[serve.RunTarget]) -> str:
        """The last line of the error of the first deployment that failed."""
        from ray import serve

        applications = serve.status().applications
        messages = [
            deployment.message
            for target in targets
            if target.name in applications
            for deployment in applications[target.name].deployments.values()
        ]
        lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
        return lines[-1] if lines else ""
