"""Processes forked from one that has imported all that training needs, which else takes each of them seconds."""

import gc
import multiprocessing
import os
import runpy
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port

SCRIPT = Path(__file__).parent.parent / "training_scripts" / "run_seq2seq.py"

runpy.run_path(str(SCRIPT))  # imports what it needs, and no more: this is not __main__
gc.freeze()  # else the first collection in each process goes through all of that

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["forked"])


def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process that calls a function of a module."""
    with pytest.MonkeyPatch.context() as patch:  # what all are forked from finds this module by it
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def on_processes(number: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
    """What a function of a module returns on each of so many processes that torchrun might have launched, by rank."""
    port, processes, ranks = free_port(), [], {}
    for rank in range(number):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        ranks[receiver] = rank
        processes.append(start(call_on_rank, sender, rank, number, port, function, arguments))
        sender.close()
    results: list[Any] = [None] * number
    try:
        while ranks:
            for receiver in wait(list(ranks)):
                rank = ranks.pop(receiver)
                try:
                    results[rank], failure = receiver.recv()
                except EOFError:
                    failure = "it ended without a word"
                assert failure is None, f"process {rank} of {number}: {failure}"
    finally:  # where one has failed the others wait for it
        for process in processes:
            process.join(None if not ranks else 0)
            process.kill()
    return results


def call_on_rank(
    sender: Connection, rank: int, number: int, port: int, function: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    torch.set_num_threads(1)
    try:
        result, failure = function(*arguments), None
    except BaseException:
        result, failure = None, traceback.format_exc()
    sender.send((result, failure))
    if failure is None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
