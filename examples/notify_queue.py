"""Workers in threads that take jobs from a queue, and report progress to the waiting user.

    python3 -m pip install ".[nats]"
    PACHINKO_BACKPLANE=nats://localhost:4222 python3 examples/notify_queue.py Ada Grace

This makes a report for each user. In Celery, `make_report` would be a task, and the rest the same.
"""

import logging
import queue
import sys
import threading
import time

from pachinko import PachinkoError, SyncHub

STEPS = 5
hub = SyncHub()  # the broker that PACHINKO_BACKPLANE names
jobs = queue.Queue[str | None]()  # the users to make reports for; None ends a worker


def make_report(user: str) -> None:
    for done in range(1, STEPS + 1):
        time.sleep(0.2)  # the work
        tell(user, done)
    print(f"the report for {user} is ready\n", end="", flush=True)  # one write a line


def tell(user: str, done: int) -> None:
    progress = {"job": "report", "done": done, "of": STEPS}
    try:
        hub.send_to_user(user, "progress", progress)
    except PachinkoError as exc:  # The job goes on when nobody can be told.
        logging.warning("%s was not told: %s", user, exc)


def work() -> None:
    while (user := jobs.get()) is not None:
        make_report(user)


if __name__ == "__main__":
    workers = [threading.Thread(target=work) for _ in range(2)]
    for job in [*sys.argv[1:], *[None for _ in workers]]:
        jobs.put(job)
    for worker in workers:
        worker.start()
    for worker in workers:  # No name can be resolved once the main thread has ended.
        worker.join()
