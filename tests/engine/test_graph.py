"""Capture and replay without a GPU: the real ``CapturedStep`` over a recorder for the CPU, against plain steps."""

import contextlib
import copy
import functools
import gc
import itertools
import random
import weakref

import pytest
import torch
from torch import nn

from rsengine.config import Recipe
from rsengine.device import Execution
from rsengine.engine.evaluation import EvaluationStep
from rsengine.engine.graph import CapturedStep, CudaRecorder, choose_step, explain_step, static_batch
from rsengine.engine.step import TrainStep
from rsengine.kernels.jit import ema_table
from rsengine.model import resnet_rs
from rsengine.model.preprocess import Preprocess
from tests.engine.graph_simulator import CaptureError, ReplayRecorder
from tests.engine.test_step import FP32, MEAN, STD, batches

pytestmark = pytest.mark.usefixtures("eager_ops")

CPU, BF16 = torch.device("cpu"), Execution(torch.device("cpu"), torch.bfloat16, 1, "test")
SIZE = 8, (16, 16)


def make(kind=TrainStep, *settings, execution=FP32, weight_copies=False, extra=None):
    """A step of a small ResNet-RS with dropout, stochastic depth and a schedule that moves at every step."""
    torch.manual_seed(0)
    model = resnet_rs(blocks=(1, 1), width_multiplier=0.125, stem_width=8, dropout=0.3, drop_path=0.3)
    if extra is not None:
        model.stem = nn.Sequential(model.stem, extra)
    recipe = Recipe().with_settings(
        ["train.epochs=10", "train.batch_size=8", "schedule.name=one_cycle", "schedule.learning_rate=0.05"]
        + ["ema.decay=0.9", "optimizer.weight_decay=0.01", *settings]
    )
    return kind(model, recipe, Preprocess(MEAN, STD), execution, 10, weight_copies=weight_copies)


def capture(step, **options):
    return CapturedStep(step, static_batch(*SIZE, CPU), ReplayRecorder(), **options)


def run(call, step, count=50, seed=1):
    """Every number that a run leaves behind, by name."""
    torch.manual_seed(seed)
    random.seed(seed)
    for images, labels in batches(count):
        call(images, labels)
    return state_of(step)


def state_of(step):
    models = {"model": step.model, "ema": step.ema_model}
    found = {f"{kind}.{name}": t for kind, m in models.items() for name, t in m.state_dict().items()}
    found |= {f"momentum.{i}": t for i, t in enumerate(step.update.momentum_buffers)}
    accumulators = ("counter", "loss_sum", "correct_sum", "image_count", "finite_count")
    found |= {name: getattr(step, name) for name in accumulators}
    found["learning rate"] = step.update.lr_table.gather(0, step.counter.clamp(max=len(step.update.lr_table) - 1))
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def differences(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# --- replays equal plain steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "execution", "weight_copies"),
    [
        ([], FP32, False),
        (["train.micro_batches=2", "optimizer.clip_norm=0.5"], FP32, False),
        (["augment.mixup_alpha=0.2", "augment.cutmix_alpha=1.0"], FP32, False),
        (["optimizer.name=muon"], FP32, False),
        (["train.freeze=stem", "optimizer.body_rate=0.1"], FP32, False),
        ([], BF16, False),
        ([], BF16, True),
        (["optimizer.name=muon", "optimizer.clip_norm=0.5"], BF16, True),
        (["optimizer.name=muon", "train.freeze=stage1", "optimizer.body_rate=0.1"], BF16, True),
    ],
    ids=[
        *("plain", "micro-batches and clipping", "mixup and cutmix", "muon", "frozen stem", "bfloat16 autocast"),
        *("copies of the weights", "copies of the weights, muon and clipping"),
        "copies of the weights, muon and a frozen stage",
    ],
)
def test_fifty_replays_equal_fifty_plain_steps_bit_for_bit(settings, execution, weight_copies):
    plain = make(TrainStep, *settings, execution=execution, weight_copies=weight_copies)
    expected = run(plain, plain)
    step = make(TrainStep, *settings, execution=execution, weight_copies=weight_copies)
    assert differences(run(capture(step), step), expected) == []
    assert int(step.counter) == 50 and int(step.image_count) == 400
    assert step.read_totals().first_bad_step == -1
    assert len(set(step.update.learning_rates[:50])) == 50  # a schedule that stood still would prove nothing


def test_building_a_captured_step_leaves_no_trace():
    step = make()
    for images, labels in batches(3):  # so that momentum, EMA and sums are not zero
        step(images, labels)
    before, rng = state_of(step), torch.get_rng_state()
    capture(step)
    assert differences(state_of(step), before) == []
    assert torch.equal(torch.get_rng_state(), rng)


def test_no_python_of_the_step_runs_in_a_replay_and_draws_still_differ():
    calls = []

    class Counted(TrainStep):
        def __call__(self, images, labels):
            calls.append(1)
            super().__call__(images, labels)

    step = make(Counted, "schedule.learning_rate=0.0")  # so that only the draws differ between steps
    captured = capture(step, warmup_steps=2)
    (images, labels), losses = next(batches(1)), []
    for _ in range(4):
        captured(images, labels)
        losses.append(step.read_totals().loss)
    assert len(calls) == 3 and len(set(losses)) == 4


def test_a_captured_step_of_resident_data_takes_no_inputs():
    stream = list(batches(50))
    images, labels = (torch.stack(tensors) for tensors in zip(*stream, strict=True))

    def resident(counter):
        chosen = counter.view(1)
        return images.index_select(0, chosen)[0], labels.index_select(0, chosen)[0]

    plain = make()
    expected = run(plain, plain)
    step = make(functools.partial(TrainStep, resident=resident))
    captured = CapturedStep(step, (), ReplayRecorder())
    assert differences(run(lambda *_: captured(), step), expected) == []
    with pytest.raises(ValueError, match="inputs: the graph was captured with 0; got 1"):
        captured(images[0])


def test_a_captured_step_keeps_the_address_tables_that_its_capture_used():
    layout = ema_table.Layout(2**41, torch.Size([16]), (1,), torch.float32)

    def table(address):
        moved = layout._replace(address=address)
        return ema_table.tables(CPU, 16, ((moved,), (), (), (moved,), ()), (0.0,))[0]

    class UsesTable:
        def __call__(self):
            self.seen = weakref.ref(table(2**41))

        def state_tensors(self):
            return []

    step = UsesTable()
    captured = CapturedStep(step, (), ReplayRecorder())
    for i in range(200):
        table(2**42 + 16 * i)
    gc.collect()
    assert step.seen() is not None
    del captured
    gc.collect()
    assert step.seen() is None


# --- faults that a replay shows -------------------------------------------------------------------------------------


class FloatRate(TrainStep):
    """Fault: the learning rate is a Python number, right at each call."""

    done = 0

    def __call__(self, images, labels):
        self.update.lr_table.fill_(float(self.update.learning_rates[self.done]))
        super().__call__(images, labels)
        self.done += 1


class ForgetsBuffers(TrainStep):
    """Fault: what warm-up does to batch norm's statistics is not undone."""

    def state_tensors(self):
        buffers = {b.data_ptr() for b in self.model.buffers()}
        return [t for t in super().state_tensors() if t.data_ptr() not in buffers]


class StaleTable(TrainStep):
    """Fault: the update keeps the gradients' addresses of the first step, and each backward pass makes new ones."""

    table = None

    def _accumulate(self, *arguments):
        super()._accumulate(*arguments)
        self.table = self.table or [p.grad for p in self.update.params]
        for p, gradient in zip(self.update.params, self.table, strict=True):
            p.grad = gradient


class HostMask(nn.Module):
    """Fault: a mask drawn on the host, anew at each call."""

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.tensor([float(random.random() < 0.7) for _ in range(len(x))])[:, None, None, None]


class DeviceMask(HostMask):
    """The same done right."""

    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) < 0.7).float() if self.training else x


def test_a_learning_rate_held_as_a_python_number_is_caught():
    reference, plain, faulty = make(), make(FloatRate), make(FloatRate)
    expected = run(reference, reference, 5)
    table = "learning rate"  # this fault writes over the table itself
    assert set(differences(run(plain, plain, 5), expected)) <= {table}
    assert "model.fc.weight" in differences(run(capture(faulty), faulty, 5), expected)


@pytest.mark.parametrize(("mask", "caught"), [(HostMask, True), (DeviceMask, False)])
def test_a_mask_drawn_once_is_caught(mask, caught):
    plain, replayed = make(extra=mask()), make(extra=mask())
    found = differences(run(capture(replayed), replayed, 5), run(plain, plain, 5))
    assert bool(found) == caught and ("model.fc.weight" in found) == caught


def test_batch_norm_statistics_spoiled_by_warm_up_are_caught():
    reference, faulty = make(), make(ForgetsBuffers)
    found = differences(run(capture(faulty), faulty, 5), run(reference, reference, 5))
    assert "model.stem.bn1.running_mean" in found and "model.stem.bn1.num_batches_tracked" in found
    assert not [name for name in found if name.startswith(("momentum.", "model.fc"))]  # training itself uses none


def test_a_gradient_whose_address_changes_is_caught():
    reference, faulty = make(), make(StaleTable)
    assert "model.fc.weight" in differences(run(capture(faulty), faulty, 5), run(reference, reference, 5))


def test_a_state_tensor_that_moves_is_refused():
    step = make()

    def reallocate():
        step.update.momentum_buffers = [torch.zeros_like(p) for p in step.update.params]

    step.update.clear_gradients = reallocate
    with pytest.raises(RuntimeError, match=rf"step: {len(step.update.params)} of \d+ state tensors moved"):
        capture(step)


def test_a_host_read_is_refused():
    class Reads(TrainStep):
        def __call__(self, images, labels):
            super().__call__(images, labels)
            self.last = float(self.loss_sum)

    with pytest.raises(CaptureError, match="_local_scalar_dense.default reads a tensor on the host"):
        capture(make(Reads))


def test_a_read_of_memory_that_nothing_wrote_is_caught():
    class ReadsScratch:
        total = torch.zeros(3)

        def __call__(self):
            self.total.add_(torch.empty(3))

        def state_tensors(self):
            return [self.total]

    step = ReadsScratch()
    captured = CapturedStep(step, (), ReplayRecorder(), warmup_steps=0)
    captured()
    assert step.total.isnan().all()


# --- inputs, evaluation, checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x[:4], y[:4]), r"inputs\[0\]: .*uint8 \(8, 16, 16, 3\).* got torch.uint8 \(4, 16, 16, 3\)"),
        (lambda x, y: (x.float(), y), r"inputs\[0\]: .*torch.uint8 \(8.* got torch.float32"),
        (lambda x, y: (x, y.int()), r"inputs\[1\]: .*torch.int64 \(8,\).* got torch.int32 \(8,\)"),
        (lambda x, y: (x.to("meta"), y), r"inputs\[0\]: .*on cpu; got .* on meta"),
        (lambda x, y: (x.transpose(1, 2), y), r"strides \(768, 48, 3, 1\), on cpu; got .*strides \(768, 3, 48, 1\)"),
        (lambda x, y: (x,), r"inputs: the graph was captured with 2; got 1"),
    ],
    ids=["shape", "dtype", "label dtype", "device", "strides", "number"],
)
def test_an_input_unlike_the_static_one_is_refused_naming_both(change, words):
    step = make()
    captured = capture(step, warmup_steps=1)
    before = state_of(step)
    with pytest.raises(ValueError, match=words):
        captured(*change(*next(batches(1))))
    assert differences(state_of(step), before) == []


def test_a_captured_evaluation_equals_a_plain_one_with_its_last_partial_batch():
    step = make()
    run(step, step, 5)
    models = {"raw": step.model, "ema": step.ema_model}
    stream = [*batches(3), tuple(tensor[:5] for tensor in next(batches(1)))]
    expected = EvaluationStep(models, step.preprocess, FP32, 10, 0.1).measure(stream)
    evaluation = EvaluationStep(models, step.preprocess, FP32, 10, 0.1)
    with evaluation.evaluation_mode():
        captured = capture(evaluation)
    run(step, step, 0)
    before = state_of(step)
    for _ in range(2):  # the second starts from zero
        found = evaluation.measure(stream, captured)
        for name, result in expected.items():
            assert found[name].loss == result.loss and (found[name].confusion == result.confusion).all()
            assert found[name].images == 29
    assert differences(state_of(step), before) == [] and step.model.training and not step.ema_model.training
    few = [tuple(tensor[:3] for tensor in next(batches(1)))]  # a test set smaller than the captured batch
    assert evaluation.measure(few, captured)["raw"].images == 3


@pytest.mark.parametrize("restore", ["into the same graph", "after another capture", "before another capture"])
def test_a_checkpoint_restored_in_place_goes_on_bit_for_bit_through_a_captured_step(restore):
    stream = list(batches(20))
    step = make()
    captured = capture(step)
    torch.manual_seed(1)
    for images, labels in stream[:10]:
        captured(images, labels)
    saved, rng = copy.deepcopy(step.state_dict()), torch.get_rng_state()
    step.read_totals()
    for images, labels in stream[10:]:
        captured(images, labels)
    expected = state_of(step)
    if restore != "into the same graph":
        step = make()
        with torch.no_grad():
            step.update.params[0].add_(1)  # another state than the saved one
    if restore == "after another capture":
        captured = capture(step)
    step.load_state_dict(saved)
    if restore == "before another capture":
        captured = capture(step)
    torch.set_rng_state(rng)
    for images, labels in stream[10:]:
        captured(images, labels)
    assert differences(state_of(step), expected) == []


# --- the choice, and the CUDA calls ---------------------------------------------------------------------------------


def test_a_step_is_captured_where_there_is_a_recorder():
    step = make()
    assert choose_step(step) is step
    assert isinstance(choose_step(step, static_batch(*SIZE, CPU), recorder=ReplayRecorder()), CapturedStep)


def test_how_steps_run_is_said_in_words():
    assert explain_step(FP32) == "plain steps (CUDA graphs need a GPU)"
    cuda = Execution(torch.device("cuda"), None, 1, "test")
    assert explain_step(cuda) == "each step one CUDA-graph replay"
    assert explain_step(cuda, graph=False) == "plain steps as asked, no CUDA graph"
    assert explain_step(cuda, compile=True).endswith("replay, forward and backward pass compiled")


def test_the_cuda_recorder_warms_up_and_captures_on_one_side_stream(monkeypatch):
    """The calls and their order, on stand-ins for what needs a GPU."""
    log = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def entered(name):
        log.append(f"enter {name}")
        yield
        log.append(f"leave {name}")

    class Graph:
        def replay(self):
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered(stream.name))

    def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        """With the signature of torch 2.11, the oldest that setup.py admits."""
        return entered(f"capture on {stream.name} into {pool}, {capture_error_mode}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    pools = iter(("pool 1", "pool 2"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    recorder = CudaRecorder(torch.device("cuda"))
    assert recorder.rng_devices == [0] and CudaRecorder(torch.device("cuda:1")).rng_devices == [1]
    with recorder.side_stream():
        log.append("warm-up")
    recorder.record(lambda: log.append("program"))()
    assert log == [
        *("side waits for current", "enter side", "warm-up", "leave side", "current waits for side"),
        *("enter capture on side into pool 1, thread_local", "program"),
        *("leave capture on side into pool 1, thread_local", "replay"),
    ]


def test_graphs_share_a_pool_as_long_as_one_of_them_lives(monkeypatch):
    """PyTorch frees a pool with its last graph, and its handle then names nothing that a capture could use."""
    used = []

    class Graph:
        def replay(self):
            pass

    @contextlib.contextmanager
    def graph(cuda_graph, pool, **options):
        used.append(pool)
        yield

    pools = itertools.count()
    for name, value in (
        ("Stream", lambda device: None),
        ("CUDAGraph", Graph),
        ("graph", graph),
        ("graph_pool_handle", lambda: next(pools)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = CudaRecorder(torch.device("cuda:0"))
    first = recorder.record(lambda: None)
    second = recorder.record(lambda: None)
    del first
    third = recorder.record(lambda: None)
    del second, third
    recorder.record(lambda: None)
    assert used == [0, 0, 0, 1]
