"""Runs a function in processes that are one group of :mod:`rsengine.parallel.ranks`, by gloo on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from rsengine.parallel.ranks import join

LIMIT = 120.0  # seconds


def run_in_processes(n: int, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
    """Call ``function(ranks, *arguments)`` in ``n`` processes, whose group ``ranks`` is. Returns the results by rank.

    The function is one of a module's, and arguments and results can be pickled. Each process has one thread.

    Raises:
        RuntimeError: a process raised an error, of which the text is part, ended, or took longer than ``limit``
            seconds. Where it was more than one, the first; all the processes have been killed.
    """
    with processes(n) as run:
        return run(function, *arguments, limit=limit)


@contextlib.contextmanager
def processes(n: int) -> Iterator[Callable[..., list[Any]]]:
    """Yields what runs functions as :func:`run_in_processes` does, in the same ``n`` processes one after another."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds one
    members, connections = [], []
    for rank in range(n):
        here, there = context.Pipe()
        members.append(context.Process(target=_serve, args=(there, _environment(rank, n, store.port)), daemon=True))
        connections.append(here)
        members[-1].start()
        there.close()  # so that the end of the process is the end of its answers

    def run(function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
        try:
            for connection in connections:
                connection.send_bytes(pickle.dumps((function, arguments)))
            return _answers(connections, limit)
        except BaseException:
            _kill(members)
            raise

    try:
        yield run
        for connection, member in zip(connections, members, strict=True):
            if member.is_alive():
                connection.send_bytes(b"")
        for member in members:
            member.join(10)
    finally:
        _kill(members)


def _environment(rank: int, n: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _answers(connections: list[Connection], limit: float) -> list[Any]:
    answers, deadline = {}, time.monotonic() + limit
    while len(answers) < len(connections):
        waited_for = [each for rank, each in enumerate(connections) if rank not in answers]
        ready = wait(waited_for, max(0.0, deadline - time.monotonic()))
        missing = ", ".join(str(connections.index(each)) for each in waited_for)
        if not ready:
            raise RuntimeError(f"no answer within {limit:g} s from rank {missing}")
        errors = []
        for connection in ready:
            rank = connections.index(connection)
            try:
                when, succeeded, answer = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):  # which may be why the others raised their errors
                when, succeeded, answer = 0.0, False, "the process ended without an answer"
            if succeeded:
                answers[rank] = answer
            else:
                errors.append((when, f"rank {rank}: {answer}"))
        if errors:
            raise RuntimeError(min(errors)[1])
    return [answers[rank] for rank in range(len(connections))]


def _kill(members: list[multiprocessing.process.BaseProcess]) -> None:
    for member in members:
        member.kill()
    for member in members:
        member.join()


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    """What each process runs: functions, until an empty message or the end of the process that started it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    ranks = None
    while task := _next(connection):
        try:
            ranks = ranks or join("cpu")
            function, arguments = pickle.loads(task)
            answer = True, function(ranks, *arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        # In bytes: tensors would be passed in shared memory, which ends with this process.
        connection.send_bytes(pickle.dumps((time.monotonic(), *answer)))
    if ranks is not None:
        ranks.leave()


def _next(connection: Connection) -> bytes:
    try:
        return connection.recv_bytes()
    except EOFError:
        return b""
