"""The hub for programs without an event loop, such as a Flask or Django app or workers in threads.

``notify_flask.py`` and ``notify_queue.py`` use it. With Django, ``views.py`` has:

    from django.http import HttpRequest, JsonResponse
    from hub_thread import HubThread
    from pachinko import hub

    hub_thread = HubThread()  # the broker that PACHINKO_BACKPLANE names

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

    The thread starts at the first call, not at the import. ``gunicorn --preload`` and Celery's pool
    fork processes between the two, and a fork does not copy threads. A process that is forked after
    the first call starts a thread of its own. (uWSGI runs threads only with ``--enable-threads``.)
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url
        self.forget()
        if hasattr(os, "register_at_fork"):  # Windows has no fork.
            os.register_at_fork(after_in_child=self.forget)
        atexit.register(self.close)

    def forget(self) -> None:
        self.lock = threading.Lock()
        self.thread = threading.Thread()  # This one never runs.
        self.opened = concurrent.futures.Future[None]()

    def call(self, method: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the hub, and wait for it: ``call(hub.send, "room:1", "said", …)``.

        Raises `PachinkoError` within 5 seconds when the broker is away. The next call tries again.
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
                with contextlib.suppress(Exception):  # A hub that did not open ends by itself.
                    self.opened.result()
                    self.loop.call_soon_threadsafe(self.end.set)
                self.thread.join()

    def run(self, opened: concurrent.futures.Future[None]) -> None:
        # At exit, asyncio starts a thread to end its others; Python 3.12.1 forbids that.
        with contextlib.suppress(RuntimeError), asyncio.Runner() as runner:
            try:
                runner.run(self.stay_open(opened))
            except Exception as exc:  # Pass any error on to the callers that wait.
                if opened.done():
                    raise
                opened.set_exception(exc)

    async def stay_open(self, opened: concurrent.futures.Future[None]) -> None:
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        async with hub.open(self.url):
            opened.set_result(None)
            await self.end.wait()  # The hub reconnects by itself meanwhile.
