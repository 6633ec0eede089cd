"""The processes that train one run together, and what they say to each other.

torchrun, or whatever else sets the variables of ``torch.distributed`` (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``MASTER_ADDR``, ``MASTER_PORT``), starts them; :func:`join` makes them one group. All of them hold the same weights and
the same state of the random number generators. Of each batch, process r of N has the images r, r + N, r + 2N and so on,
and whatever is drawn for images is drawn for the whole batch, of which each process takes its part; so an image is
treated in the same way whatever N is.

A run in one process is the case N = 1, :data:`ALONE`: nothing is sent, and nothing of ``torch.distributed`` is used.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from rsengine.data.errors import UserError, one_line
from rsengine.errors import SettingsError

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=30)  # one process may convert the data set while the others wait
LAUNCHED = "RSENGINE_LAUNCHED"  # a variable of the processes that ``--processes`` starts: the folder of their launcher
CONSEQUENCE = 3  # the exit status of a process that ends because another one did, which says why or was killed
_DYING = 2.0  # seconds in which a process whose connections are closed already may still be there
_groups = itertools.count()  # a program may train several times


class LostProcessError(UserError):
    """Another process of the run ended, or did not answer, while this one waited for it."""

    status = 1


@dataclass(frozen=True)
class Ranks:
    """The group of a run's processes, as one of them sees it.

    Attributes:
        rank: of this process, from 0; the process of rank 0 prints and records.
        size: the number of processes.
        local_rank, local_size: the same among those on this machine.
        backend: what carries tensors between them, ``"gloo"`` or ``"nccl"``; empty for one process.
        attempt: how often the agent of torchrun has started this group again.
        under_agent: whether an agent watches this process: torchrun, or that of ``--processes``.
        launched: whether it is that of ``--processes``, which says itself that it lost a process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    backend: str = ""
    attempt: int = 0
    under_agent: bool = False
    launched: bool = False
    _store: dist.Store | None = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __deepcopy__(self, _memo: dict[int, Any]) -> Ranks:
        return self  # a copy of a network belongs to the same processes

    # --- parts of batches ---------------------------------------------------------------------------------------------

    def part(self, whole: T) -> T:
        """This process's part of what belongs to a whole batch: every ``size``-th entry of the first dimension."""
        return whole if self.size == 1 else whole[self.rank :: self.size]

    def share_of(self, count: int, name: str) -> int:
        """``count`` over the processes. Raises :class:`SettingsError` where it cannot be divided."""
        if count % self.size:
            near = count - count % self.size or self.size
            raise SettingsError(
                f"{name}: expected a multiple of the {self.size} processes; got {count}; use {name}={near} or another "
                "number of processes"
            )
        return count // self.size

    def previous(self, images: Tensor) -> Tensor:
        """For each image of this process's part, the one before it in the whole batch; the first one's is the last.

        ``images``: (N, ...), as many in each process. The same for labels.
        """
        if self.size == 1:
            return images.roll(1, 0)
        parts = self.gathered(images)
        return parts[self.rank - 1] if self.rank else parts[-1].roll(1, 0)

    # --- in a step: tensor programs, which can be captured ------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add the other processes' ``tensor`` to this one's, in place. It is contiguous. All get the same bits."""
        if self.size == 1:
            return tensor
        if torch.compiler.is_compiling():  # which has no form without side effects for the operator below
            whole = torch.ops._c10d_functional.all_reduce(tensor, "sum", _group_name())
            return tensor.copy_(torch.ops._c10d_functional.wait_tensor(whole))
        torch.ops._c10d_functional.all_reduce_(tensor, "sum", _group_name())
        torch.ops._c10d_functional.wait_tensor(tensor)
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """``tensor`` of every process, by rank: (size, ...), of the same shape and dtype in each."""
        if self.size == 1:
            return tensor[None]
        whole = torch.ops._c10d_functional.all_gather_into_tensor(tensor.contiguous(), self.size, _group_name())
        return torch.ops._c10d_functional.wait_tensor(whole).view(self.size, *tensor.shape)

    # --- between steps, on the host -----------------------------------------------------------------------------------

    def most(self, *values: int) -> list[int]:
        """For each of ``values``, the largest that any process gives. All must call it at the same moment."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_main(self, value: T) -> T:
        """``value`` of the process of rank 0."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, 0, device=torch.device("cpu"))
        return holder[0]

    def all_of(self, value: T) -> list[T]:
        """``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        # As bytes in a tensor on the CPU: the collective for objects would put them on the GPU under NCCL.
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        (longest,) = self.most(len(mine))
        padded = torch.zeros(longest + 8, dtype=torch.uint8)
        padded[:8] = torch.tensor([len(mine)]).view(torch.uint8)
        padded[8 : 8 + len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        lengths = [int(part[:8].view(torch.int64)) for part in parts]
        pairs = zip(parts, lengths, strict=True)
        return [pickle.loads(part[8 : 8 + length].numpy().tobytes()) for part, length in pairs]

    @torch.no_grad()
    def copy_from_main_(self, tensors: Sequence[Tensor]) -> None:
        """Give ``tensors`` the values that they have in the process of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                row_major = tensor.detach().contiguous()  # which gloo and NCCL send; a copy of what is channels_last
                dist.broadcast(row_major, 0)
                tensor.copy_(row_major)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """In this block the first process of each machine goes before the others of it: what it leaves on the disk is
        there for them."""
        if self.local_rank == 0:
            yield
        if self.size > 1:
            dist.barrier()
        if self.local_rank:
            yield

    # --- over attempts ------------------------------------------------------------------------------------------------

    def remember(self, name: str, value: str) -> None:
        """Keep ``value`` for the next attempt, where an agent may start one."""
        if self._store is not None and self.under_agent:
            self._store.set(f"rsengine/kept/{name}", value)

    def remembered(self, name: str) -> str | None:
        """What :meth:`remember` kept in an earlier attempt."""
        key = f"rsengine/kept/{name}"
        if self._store is None or not self.under_agent or not self._store.check([key]):
            return None
        return self._store.get(key).decode()

    # --- errors -------------------------------------------------------------------------------------------------------

    def run(self, work: Callable[[], T]) -> T:
        """``work()``, of whose errors in all the processes one reaches the user: the first.

        Raises:
            LostProcessError: another process ended, and has not said why, or does not answer.
            SystemExit: what made this process end is, or will be, said elsewhere.
        """
        if self.size == 1:
            return work()
        try:
            return work()
        except BaseException as error:
            of_connection = _is_of_connection(error)
            lost = self._lost(_DYING * of_connection) if _may_be_of_connection(error) else []
            if not self._is_first_error() or (lost and self.launched):
                raise SystemExit(CONSEQUENCE) from None
            remedy = "what the last checkpoint holds is kept: go on with the same command and --resume --out FOLDER"
            if lost:
                raise LostProcessError(f"{' and '.join(lost)} was killed, or ended without a word; {remedy}") from error
            if of_connection:
                reason = one_line(error)[:200]
                raise LostProcessError(
                    f"the processes do not reach each other any more ({reason}); see whether all of them are running; "
                    f"{remedy}"
                ) from error
            raise

    def leave(self) -> None:
        """End the group. Whatever was captured with it must be gone."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _is_first_error(self) -> bool:
        try:
            return self._store.add(f"rsengine/errors/{self.attempt}", 1) == 1
        except RuntimeError:  # the store ended with the process that held it
            return True

    def _lost(self, seconds: float) -> list[str]:
        """The processes of this machine that have ended, or end within ``seconds``, in words."""
        deadline = time.monotonic() + seconds
        while True:
            found = []
            for rank in range(self.size):
                try:
                    if not self._store.check([_member(self.attempt, rank)]):
                        continue  # it has not come so far
                    host, process, started = self._store.get(_member(self.attempt, rank)).decode().split()
                except RuntimeError:
                    return ["the process of rank 0"] if self.rank and not self.under_agent else []
                if host == socket.gethostname() and not _is_alive(int(process), float(started)):
                    found.append(f"rank {rank} (process {process})")
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)


ALONE = Ranks()


def join(device: str = "auto", environment: Mapping[str, str] = os.environ) -> Ranks:
    """Join the other processes of this run, as ``environment`` names them; without any, :data:`ALONE`.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``: tensors are sent by NCCL on GPUs, where each process takes the one
            of its local rank, else by gloo.

    Raises:
        SettingsError: a variable is missing or wrong, or a machine has fewer GPUs than processes.
        LostProcessError: the processes do not reach each other.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return ALONE
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank >= size:
        raise SettingsError(f"RANK: expected a number below WORLD_SIZE, {size}; got {rank}; start with torchrun")
    local_rank = _number(environment, "LOCAL_RANK", rank)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", size)
    attempt = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        if local_size > torch.cuda.device_count():
            raise SettingsError(
                f"{local_size} processes on a machine with {torch.cuda.device_count()} GPUs; start as many as there "
                "are GPUs, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), _number(environment, "MASTER_PORT", 29500)
    if port >= 2**16:
        raise SettingsError(f"MASTER_PORT: expected a port, a number below {2**16}; got {port}")
    holds_store = not agent and rank == 0
    try:
        store = dist.TCPStore(address, port, is_master=holds_store, timeout=TIMEOUT, wait_for_workers=False)
    except RuntimeError as error:  # PyTorch's own errors of connections are of this class
        what = "cannot be opened here" if holds_store else "does not answer"
        raise SettingsError(
            f"MASTER_ADDR and MASTER_PORT: {address}:{port} {what} ({one_line(error)[:200]}); name a free port of the "
            "machine of rank 0"
        ) from error
    ranks = Ranks(
        rank,
        size,
        local_rank,
        local_size,
        "nccl" if on_gpus else "gloo",
        attempt,
        "TORCHELASTIC_RUN_ID" in environment,
        LAUNCHED in environment,
        store,
    )
    if size > 1:
        process = psutil.Process()
        store.set(_member(attempt, rank), f"{socket.gethostname()} {process.pid} {process.create_time()}")
        ranks.run(
            lambda: dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
                store=dist.PrefixStore(f"rsengine/group/{attempt}/{next(_groups)}", store),
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
            )
        )
    return ranks


def _group_name() -> str:
    return dist.group.WORLD.group_name


def _member(attempt: int, rank: int) -> str:
    return f"rsengine/members/{attempt}/{rank}"


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name, "" if otherwise is None else str(otherwise))
    if not text.isdecimal():
        raise SettingsError(
            f"{name}: expected a number in this environment variable, as torchrun sets it; got {text or 'none'!r}; "
            "start with torchrun, or unset RANK and WORLD_SIZE to train in one process"
        )
    return int(text)


def _is_alive(process: int, started: float) -> bool:
    try:
        found = psutil.Process(process)
        return found.create_time() == started and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _may_be_of_connection(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and not isinstance(error, UserError)


def _is_of_connection(error: BaseException) -> bool:
    """Whether ``error`` comes from what carries tensors, gloo or NCCL, or from the store. gloo's have no class."""
    return isinstance(error, dist.DistError) or (_may_be_of_connection(error) and "gloo" in str(error))
