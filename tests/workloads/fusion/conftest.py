"""A classifier that is trained for the tests: few layers, short clips, plain evidence."""

from collections.abc import Mapping

import pytest
import torch

from skipkernels.workloads.fusion.clips import ClipSource
from skipkernels.workloads.fusion.network import FusionNetwork
from skipkernels.workloads.fusion.trainer import Schedule, train

SOURCE = ClipSource(segments=4, frames={"audio": 2, "video": 4}, strengths={"audio": 1.2, "video": 0.8})
SHAPE: Mapping[str, int] = {"layers": 6, "hidden": 32, "intermediate": 64, "heads": 2}


@pytest.fixture(scope="session")
def network() -> FusionNetwork:
    torch.set_num_threads(1)
    return train(SOURCE, Schedule(steps=150, clips=32, learning_rate=4e-3), seed=0, shape=SHAPE)
