"""Starts fork servers and hands them requests.

The processes of one run go to one server after the other. Each server hashes strings differently, as two interpreters
do: whatever depends on the order of a set comes out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import finitune

T = TypeVar("T")
R = TypeVar("R")
_TESTS = Path(__file__).parents[1]
_SOURCE = Path(finitune.__file__).parents[1]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FINITUNE_LANG": "en",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(_SOURCE), str(_TESTS)]),
}


class Server:
    """One fork server; requests are answered one after the other."""

    def __init__(self, scratch: Path, data: Path, hash_seed: int = 0) -> None:
        self.scratch, self.data = scratch, data
        self.next = self
        """The server for the next process of the same run."""
        self._lock = threading.Lock()
        for folder in (scratch, data):
            folder.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count(1)
        with (scratch / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kill.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **_ENVIRONMENT, "PYTHONHASHSEED": str(hash_seed)},
                text=True,
            )

    def ask(self, task: str, **request: Any) -> dict[str, Any]:
        """Send a request, wait for its reply. ``reply["log"]`` is where the child's output is."""
        log = str(request.pop("log", self.scratch / f"child-{next(self._numbers)}.log"))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        text = json.dumps({"task": task, "log": log, "data": str(self.data), **request}) + "\n"
        with self._lock, contextlib.suppress(BrokenPipeError):
            reply = ""
            self._process.stdin.write(text)
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the fork server is gone; see {self.scratch / 'server.log'}")
        return {**json.loads(reply), "log": log}

    def warm_up(self, configuration: str) -> None:
        """Let it import what runs import late, so that its children need not."""
        home = self.scratch / "warm-up"
        home.mkdir()
        found = self.ask("modules", configuration=configuration, home=str(home))
        if "modules" in found:
            self.ask("import", modules=found["modules"])

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(timeout=30)


class Pool:
    """Some servers, used by as many threads of the test process."""

    def __init__(self, scratch: Path, count: int) -> None:
        self.servers = [Server(scratch / f"server-{n}", scratch / "data", n) for n in range(count)]
        for server, following in zip(self.servers, [*self.servers[1:], self.servers[0]], strict=True):
            server.next = following
        self._free: Queue[Server] = Queue()
        self._threads = ThreadPoolExecutor(count)
        for server in self.servers:
            self._free.put(server)

    def map(self, work: Callable[[Server, T], R], items: Iterable[T]) -> list[R]:
        """``work(server, item)`` for all items, in their order."""
        return list(self._threads.map(lambda item: self._one(work, item), items))

    def _one(self, work: Callable[[Server, T], R], item: T) -> R:
        server = self._free.get()
        try:
            return work(server, item)
        finally:
            self._free.put(server)

    def warm_up(self, configuration: str) -> None:
        """Every server: see :meth:`Server.warm_up`."""
        list(self._threads.map(lambda server: server.warm_up(configuration), self.servers))

    def close(self) -> None:
        """End them all."""
        self._threads.shutdown()
        for server in self.servers:
            server.close()
