"""Processes of our own that are asked one thing at a time, each on one core."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import multiprocessing
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import psutil
import uvloop

CORES: list[int] = getattr(psutil.Process(), "cpu_affinity", list)()
"""The processor cores that may be used; none where the system cannot pin a process."""
PINNED: bool = len(CORES) > 1
OPEN_FILES = 20_000  # the clients of a dozen servers

Pipe: TypeAlias = "Connection[Any, Any]"
context = multiprocessing.get_context("spawn")  # none inherits what another has imported


class ChildFailed(Exception):
    """A child answers with an error, takes too long, or is gone."""


class Child:
    """A process that runs *target* with its end of a pipe, and ends with this one.

    It begins by answering what it is told `about`. Then it is pinned: to the first core, where all
    that is measured is, or to the last.
    """

    def __init__(self, target: Callable[..., None], *arguments: str, core: int = 0) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._core = core
        self._about: Any = None
        self._pipe.send(("about", {}))

    @property
    def about(self) -> Any:
        """Waits until it is up. Raises `ChildFailed`, as `ask` does."""
        if self._about is None:
            self._about = self._answer("about", 60)
            if PINNED:
                psutil.Process(self._process.pid).cpu_affinity([CORES[self._core]])
        return self._about

    def ask(self, do: str, *, timeout: float = 120, **arguments: Any) -> Any:
        """What its function *do* returns."""
        assert self.about is not None
        with contextlib.suppress(OSError):  # then there is no answer either
            self._pipe.send((do, arguments))
        return self._answer(do, timeout)

    def _answer(self, do: str, timeout: float) -> Any:
        try:
            if not self._pipe.poll(timeout):
                self.close()
                raise ChildFailed(f"no answer to {do!r} in {timeout:g} s")
            result, error = self._pipe.recv()
        except (EOFError, OSError) as exc:
            raise ChildFailed(f"it ended before it answered {do!r}") from exc
        if error is not None:
            raise ChildFailed(error)
        return result

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def answer(pipe: Pipe, commands: object, run: Callable[[Any], Any] | None = None) -> None:
    """In a child: one question, answered by a method of *commands*."""
    do, arguments = pipe.recv()
    try:
        result = getattr(commands, do)(**arguments)
        pipe.send((run(result) if run and inspect.isawaitable(result) else result, None))
    except Exception as exc:  # told to the parent, whatever it is
        pipe.send((None, text_of(exc)))


def answer_all(
    pipe: Pipe,
    commands: Callable[[], object],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
) -> None:
    """In a child: every question, in one event loop."""
    with explained(pipe), asyncio.Runner(loop_factory=loop_factory) as runner:
        made = commands()
        while True:
            answer(pipe, made, runner.run)


@contextlib.contextmanager
def explained(pipe: Pipe) -> Iterator[None]:
    """In a child: keep quiet, and answer the first question with what went wrong."""
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        yield
    except (EOFError, KeyboardInterrupt):
        pass  # no more questions
    except Exception as exc:  # the same
        pipe.recv()
        pipe.send((None, text_of(exc)))


def text_of(exc: Exception) -> str:
    while isinstance(exc, ExceptionGroup):
        exc = exc.exceptions[0]
    return f"{type(exc).__name__}: {exc}"


def allow_open_files() -> int:
    """In a child with many connections: have as many as are needed; how many there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        soft = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return OPEN_FILES if soft == resource.RLIM_INFINITY else soft
