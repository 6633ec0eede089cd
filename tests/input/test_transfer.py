"""The feeder's three waits: right in every legal order of a simulated device, and wrong without any one of them."""

import contextlib
import random

import pytest
import torch

from rsengine.input.transfer import CudaLanes, Feeder, TensorBuffers, feeder_for

SCHEDULES = 300


class Race(RuntimeError):
    """Two accesses to one buffer, at least one of them a write, in an order that nothing fixes; or stale contents."""


class SimulatedLanes:
    """:class:`rsengine.input.transfer.Lanes` of a device that takes its time: batches are numbers, buffers hold one.

    Host calls only queue work. Between them, ``chance`` decides how far each lane gets; a copy or a step has a
    beginning and an end, so that others may fall between. ``without``: names of waits left out, to see that it shows.
    """

    def __init__(self, chance: random.Random, without=()):
        self.chance, self.without = chance, set(without)
        self.queues = {"main": [], "copy": []}
        self.active = {}  # (buffer, half) -> set of accesses under way, "read" or "write"
        self.seen = []  # what each step read
        self.waiting_steps = 0  # queued and not over

    # --- the interface ---

    def new_event(self):
        return {"recorded": 0, "reached": 0}

    def new_buffers(self):
        buffers = SimulatedBuffers(self)
        # Until whatever was queued before is over, the device's memory belongs to someone else.
        self.queues["main"] += self._access(buffers, "device", "read", lambda: None)
        return buffers

    def record(self, event, lane):
        if "first record" in self.without and lane == "main" and not event.get("skipped"):
            event["skipped"] = True  # of an event in this lane: those made before the first batch
            return
        event["recorded"] += 1
        number = event["recorded"]
        self.queues[lane].append((lambda: True, lambda: event.update(reached=number)))
        self._advance()

    def wait(self, event, lane):
        if f"wait in {lane}" not in self.without:
            number = event["recorded"]
            self.queues[lane].append((lambda: event["reached"] >= number, lambda: None))
        self._advance()

    def wait_on_host(self, event):
        if "wait on host" not in self.without:
            number = event["recorded"]
            while event["reached"] < number:
                assert self._run_one(), "deadlock: the host waits for what cannot happen"
        self._advance()

    def upload(self, buffers):
        buffers.upload()
        self._advance()

    def step(self, inputs):
        """Queue a step: it reads the device's half, and must find the batch that the host had in mind."""
        buffers, expected = inputs

        def look():
            if buffers.device != expected:
                raise Race(f"the step of batch {expected} read batch {buffers.device}")
            self.seen.append(buffers.device)

        begin, end = self._access(buffers, "device", "read", look)
        self.waiting_steps += 1

        def over():
            end[1]()
            self.waiting_steps -= 1

        self.queues["main"] += [begin, (end[0], over)]
        self._advance()

    def finish(self):
        while self._run_one():
            pass
        assert not any(self.queues.values()), "deadlock: work is left that waits for ever"

    # --- the device ---

    def _access(self, buffers, half, kind, effect):
        """Two pieces of work, the beginning and the end of an access."""
        accesses = self.active.setdefault((buffers, half), [])

        def begin():
            if accesses and (kind == "write" or "write" in accesses):
                raise Race(f"a {kind} of the {half} buffer began during a {accesses[0]}")
            accesses.append(kind)
            effect()

        return [(lambda: True, begin), (lambda: True, lambda: accesses.remove(kind))]

    def _run_one(self):
        ready = [queue for queue in self.queues.values() if queue and queue[0][0]()]
        if not ready:
            return False
        try:
            self.chance.choice(ready).pop(0)[1]()
        except Race:
            self.queues = {"main": [], "copy": []}  # what would follow means nothing
            raise
        return True

    def _advance(self):
        for _ in range(self.chance.choice((0, 0, 1, 2, 20))):
            self._run_one()


class SimulatedBuffers:
    def __init__(self, lanes):
        self.lanes, self.host, self.device, self.number = lanes, None, None, None

    def write(self, batch):
        if self.lanes.active.get((self, "host")):
            self.lanes.queues = {"main": [], "copy": []}
            raise Race("the host wrote a pinned buffer during its transfer")
        self.host = self.number = batch
        self.lanes._advance()

    def upload(self):
        number = self.number

        def read():
            if self.host != number:
                raise Race(f"the transfer of batch {number} read batch {self.host}")

        def write():
            self.device = number

        reading = self.lanes._access(self, "host", "read", read)
        writing = self.lanes._access(self, "device", "write", write)
        both = [reading[0], writing[0], writing[1], reading[1]]
        self.lanes.queues["copy"] += both

    def inputs(self):
        return self, self.number


def run(lanes, *epochs, stop_after=None):
    """Feed epochs of numbered batches, a step queued for each; every step must have read its own."""
    feeder = Feeder(lanes)
    expected = []
    for count in epochs:
        with contextlib.closing(feeder.feed(range(len(expected), len(expected) + count))) as stream:
            for done, inputs in enumerate(stream, start=1):
                lanes.step(inputs)
                expected.append(inputs[1])
                assert lanes.waiting_steps <= 4  # the host does not run away from the device
                if done == stop_after:
                    break
    lanes.finish()
    assert lanes.seen == expected


@pytest.mark.parametrize("stop_after", [None, 1, 2, 3], ids=lambda value: f"stop after {value}")
def test_no_schedule_shows_a_race(stop_after):
    for seed in range(SCHEDULES):
        run(SimulatedLanes(random.Random(seed)), 7, 1, 4, stop_after=stop_after)


@pytest.mark.parametrize("wait", ["wait on host", "wait in copy", "wait in main", "first record"])
def test_leaving_out_any_one_wait_is_a_race_in_some_schedule(wait):
    caught = 0
    for seed in range(SCHEDULES):
        try:
            run(SimulatedLanes(random.Random(seed), without=[wait]), 7, 4)
        except Race:
            caught += 1
    assert caught >= SCHEDULES // 100, caught


def test_a_step_queued_after_the_next_batch_was_asked_for_is_a_race():
    def late(seed):
        lanes = SimulatedLanes(random.Random(seed))
        batches = list(Feeder(lanes).feed(range(5)))
        for inputs in batches:
            lanes.step(inputs)
        lanes.finish()

    caught = 0
    for seed in range(SCHEDULES):
        try:
            late(seed)
        except Race:
            caught += 1
    assert caught == SCHEDULES


def test_a_transfer_overlaps_the_step_before_it():
    """A device whose steps never end by themselves: the next batch arrives all the same."""
    lanes = SimulatedLanes(random.Random(0))
    stream = Feeder(lanes).feed(range(3))
    lanes.step(next(stream))
    while lanes.seen != [0]:  # the first step has begun; hold it there
        lanes._run_one()
    held = lanes.queues["main"]
    lanes.queues["main"] = []
    next(stream)
    while lanes._run_one():
        pass
    assert {buffers.device for buffers, half in lanes.active if half == "device"} == {0, 1} and held


def test_buffers_carry_whole_and_smaller_batches_and_refuse_others():
    buffers = TensorBuffers(4, (2, 3), torch.device("cpu"), pinned=False)
    for n in (4, 1):
        images, labels = torch.randint(0, 256, (n, 2, 3, 3), dtype=torch.uint8), torch.arange(n)
        buffers.write((images, labels))
        buffers.upload()
        assert all(torch.equal(a, b) for a, b in zip(buffers.inputs(), (images, labels), strict=True))
    good = torch.zeros(4, 2, 3, 3, dtype=torch.uint8)
    for batch, words in [
        ((torch.zeros(5, 2, 3, 3, dtype=torch.uint8), torch.zeros(5).long()), r"images: expected torch.uint8 \(4, 2"),
        ((good.float(), torch.zeros(4).long()), r"images: .* got torch.float32 \(4, 2, 3, 3\)"),
        ((good[:, :1], torch.zeros(4).long()), r"images: .* got torch.uint8 \(4, 1, 3, 3\)"),
        ((good, torch.zeros(4)), r"labels: expected torch.int64 \(4,\), or fewer rows; got torch.float32"),
        ((good, torch.zeros(3).long()), r"images: .* got torch.uint8 \(4, 2, 3, 3\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            buffers.write(batch)


def test_the_cpu_needs_no_feeder():
    assert feeder_for(torch.device("cpu"), 4, (2, 3)) is None


def test_cuda_lanes_queue_each_call_in_its_stream(monkeypatch):
    """The calls and their order, on stand-ins for what needs a GPU."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event.name}")

    class Event:
        def __init__(self, blocking):
            self.name = f"event {sum(line.startswith('new') for line in log)}"
            log.append(f"new {self.name}")

        def record(self, stream):
            log.append(f"{self.name} in {stream.name}")

        def synchronize(self):
            log.append(f"host waits for {self.name}")

    @contextlib.contextmanager
    def entered(stream):
        log.append(f"enter {stream.name}")
        yield
        log.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("steps"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    lanes = CudaLanes(4, (2, 3), torch.device("cpu"))
    monkeypatch.setattr(lanes, "new_buffers", lambda: TensorBuffers(4, (2, 3), torch.device("cpu"), pinned=False))
    feeder = Feeder(lanes)
    assert log[4:] == ["event 1 in steps", "event 3 in steps"]
    log.clear()
    for _ in feeder.feed([(torch.zeros(4, 2, 3, 3, dtype=torch.uint8), torch.zeros(4).long())]):
        log.append("step")
    assert log == [
        *("host waits for event 0", "copies waits for event 1", "enter copies", "leave copies", "event 0 in copies"),
        *("steps waits for event 0", "step", "event 1 in steps"),
    ]
