"""A stand-in for a GPU: the replay simulator captures, and the profiler saw what the test says."""

import contextlib

import torch

from rsengine.checks.gpu.device import DRY_RUN, Setup, Work
from tests.engine.graph_simulator import ReplayRecorder

ROUNDS = 2
STEP = (("kernel", 0, 6), ("Memcpy HtoD", 4, 8), ("kernel", 9, 10))


class StandIn:
    device = torch.device("cpu")
    is_gpu = True
    recorder = ReplayRecorder

    def synchronize(self):
        pass

    def no_waiting(self):
        return contextlib.nullcontext()

    def profile(self, run):
        """The work of as many rounds as a measurement asks for, and one more."""
        run()
        return [Work(name, start + 10 * i, end + 10 * i) for i in range(ROUNDS + 1) for name, start, end in STEP]

    def feeder(self, batch_size):
        return None


class Spoiled(StandIn):
    """Captures that go wrong."""

    def __init__(self, spoil):
        self.spoil = spoil

    def recorder(self):
        recorder, spoil = ReplayRecorder(), self.spoil

        class Recorder(ReplayRecorder):
            def record(self, program):
                replay = recorder.record(program)
                return lambda: spoil(replay)

        return Recorder()


def setup(device=None, steps=12):
    options = {"steps": steps, "rounds": ROUNDS, "round_steps": 2, "profiled_steps": ROUNDS}
    return Setup(device or StandIn(), DRY_RUN, **options, log=lambda line: None)
