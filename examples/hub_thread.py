"""The hub for programs without an event loop: a Flask or Django app, a worker that runs in threads.

``notify_flask.py`` and ``notify_queue.py`` use it. With Django, ``views.py`` has:

    from django.http import HttpRequest, JsonResponse
    from hub_thread import HubThread
    from pachinko import hub

    hub_thread = HubThread()  # the engine is that of PACHINKO_BACKPLANE

    def notify(request: HttpRequest, user: str) -> JsonResponse:
        hub_thread.call(hub.send_to_user, user, "notice", {"text": request.POST["text"]})
        return JsonResponse({"sent": True})
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from pachinko import hub

P = ParamSpec("P")
T = TypeVar("T")


class HubThread:
    """A thread with an event loop, in which the hub is open.

    It starts at the first call, not at the import: ``gunicorn --preload`` and Celery's pool fork
    their processes in between, and no thread goes along. One that is forked later starts anew.
    (uWSGI runs threads only with ``--enable-threads``.)
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url
        self.forget()
        if hasattr(os, "register_at_fork"):  # Windows has neither
            os.register_at_fork(after_in_child=self.forget)
        atexit.register(self.close)

    def forget(self) -> None:
        self.lock = threading.Lock()
        self.thread = threading.Thread()  # one that does not run
        self.opened = concurrent.futures.Future[None]()

    def call(self, method: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the hub, and wait for it: ``call(hub.send, "room:1", "said", …)``.

        Raises `PachinkoError` within 5 seconds when the engine is away. The next call tries again.
        """
        with self.lock:
            if not self.thread.is_alive():
                self.opened = concurrent.futures.Future[None]()
                self.thread = threading.Thread(target=self.run, args=[self.opened], daemon=True)
                self.thread.start()
            opened = self.opened
        opened.result()
        return hub.call_threadsafe(method, *args, **kwargs).result()

    def close(self) -> None:
        """Disconnect. A later call connects again."""
        with self.lock:
            if self.thread.is_alive():
                with contextlib.suppress(Exception):  # if it could not be opened, it ends anyway
                    self.opened.result()
                    self.loop.call_soon_threadsafe(self.end.set)
                self.thread.join()

    def run(self, opened: concurrent.futures.Future[None]) -> None:
        # At exit, Python 3.12.1 forbids the thread that asyncio starts to end its other ones with.
        with contextlib.suppress(RuntimeError), asyncio.Runner() as runner:
            try:
                runner.run(self.stay_open(opened))
            except Exception as exc:  # whatever it is, those who wait learn it
                if opened.done():
                    raise
                opened.set_exception(exc)

    async def stay_open(self, opened: concurrent.futures.Future[None]) -> None:
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        async with hub.open(self.url):
            opened.set_result(None)
            await self.end.wait()  # meanwhile the hub reconnects by itself
