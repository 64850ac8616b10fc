"""Keeps Ray on this machine.

By itself Ray listens on all interfaces, and unpickles what comes in there. What is done about it below is none of Ray's
public interface; a test looks at every port that is open.
"""

from __future__ import annotations

LOOPBACK = "127.0.0.1"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too, this makes loopback the address of Ray's own servers
}


def on_loopback(kind: type[object]) -> type[object]:
    """``kind``, whose deployments open their own ports on loopback only: Serve opens one for each after it made the
    object."""

    class OnLoopback(kind):  # type: ignore[valid-type, misc]
        def __init__(self, *arguments: object) -> None:
            from ray.serve._private import replica

            listen = replica.add_port_to_grpc_server
            replica.add_port_to_grpc_server = lambda server, address: listen(server, address.replace("[::]", LOOPBACK))
            super().__init__(*arguments)

    return OnLoopback
