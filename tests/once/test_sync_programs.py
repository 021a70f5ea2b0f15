"""Programs with a `SyncHub`: forks, how they end, and an interrupt. They take their time."""

from __future__ import annotations

import os
from typing import Any

import pytest
from brokers import BrokerKind, running
from test_sync import each_broker, heard, run, scene, welcome

FORKS: dict[str, tuple[list[Any], str]] = {
    "before the first call": (["parent", 0, 1, 2], """
wait(*[fork(lambda n=n: hub.send("room", "said", n)) for n in range(3)])
hub.send("room", "said", "parent")
"""),
    "after a call": (["parent", "parent again", 0, 1, 2], """
hub.send("room", "said", "parent")
for n in range(3):
    wait(fork(lambda: hub.send("room", "said", n)))
hub.send("room", "said", "parent again")
"""),
    "of a child that has been forked": ([
        "parent", "child", "grandchild", "child again", "parent again"
    ], """
hub.send("room", "said", "parent")
def child():
    hub.send("room", "said", "child")
    wait(fork(lambda: hub.send("room", "said", "grandchild")))
    hub.send("room", "said", "child again")
wait(fork(child))
hub.send("room", "said", "parent again")
"""),
    "while threads call": ([*range(10), "parent"], """
over = threading.Event()
def work():
    while not over.is_set():
        hub.send("nobody", "said")
threads = [threading.Thread(target=work) for _ in range(8)]
[each.start() for each in threads]
for n in range(10):
    wait(fork(lambda: hub.send("room", "said", n)))
over.set()
[each.join() for each in threads]
hub.send("room", "said", "parent")
"""),
    "while a thread starts": ([*range(10), "parent"], """
pids = []
for n in range(10):
    hub.stop()
    threads = [threading.Thread(target=hub.send, args=("nobody", "said")) for _ in range(4)]
    [each.start() for each in threads]
    pids.append(fork(lambda: hub.send("room", "said", n)))
    [each.join() for each in threads]
wait(*pids)
hub.send("room", "said", "parent")
"""),
    "while another thread holds the lock": (["child", "parent"], """
import pachinko_cluster
held, let = threading.Event(), threading.Event()
def hold():
    with pachinko_cluster._starting:
        held.set()
        let.wait()
holder = threading.Thread(target=hold)
holder.start()
held.wait()
threading.Timer(0.2, let.set).start()
wait(fork(lambda: hub.send("room", "said", "child")))
holder.join()
hub.send("room", "said", "parent")
"""),
    "by multiprocessing": (["parent", *range(6), "parent again"], """
import multiprocessing
fork = multiprocessing.get_context("fork")
def work(n):
    hub.send("room", "said", n)
work("parent")
with fork.Pool(3) as pool:
    pool.map(work, range(6))
    pool.close()
    pool.join()
work("parent again")
"""),
    "and the child drops it": (["parent", "child", "parent again"], """
import gc
hub.send("room", "said", "parent")
url = sys.argv[1]
def child():
    global hub
    hub.stop()
    del hub
    gc.collect()
    with SyncHub(url) as own:
        own.send("room", "said", "child")
wait(fork(child))
hub.send("room", "said", "parent again")
"""),
    "that Python does not notice": (["parent", "child", "parent again"], """
import ctypes
hub.send("room", "said", "parent")
pid = ctypes.PyDLL(None).fork()  # As uWSGI does it.
if pid == 0:
    try:
        hub.send("room", "said", "child")
    finally:
        os._exit(0)
wait(pid)
hub.send("room", "said", "parent again")
"""),
}  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@each_broker
@pytest.mark.parametrize("when", FORKS)
async def test_a_fork(kind: BrokerKind, when: str) -> None:
    """Parent and child both go on; the child has a thread and a connection of its own."""
    async with scene(kind) as at, at.member() as ada:
        await welcome(ada)
        expected, code = FORKS[when]
        assert await run(code, at.broker.url) == (0, "")
        received = [(await heard(ada))[1] for _ in expected]
        assert sorted(map(str, received)) == sorted(map(str, expected))


# The end of a program

ENDS = {
    "after a call": """
hub.send("room", "said")
""",
    "of one that has resolved a name": """
url = sys.argv[1].replace("127.0.0.1", "localhost")
hub = SyncHub(url)
hub.send("room", "said")
""",
    "after an error": """
hub.send("room", "said")
print("an error")
sys.exit(3)
""",
    "before another thread": """
hub.send("nobody", "said")
def work():
    threading.main_thread().join()
    hub.send("room", "said")
threading.Thread(target=work).start()
""",
    "in a function of atexit": """
import atexit
hub.send("nobody", "said")
atexit.register(hub.send, "room", "said")
""",
    "after an interrupt": """
hub.send("nobody", "said")
try:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    while True:
        hub.presence("room")
except KeyboardInterrupt:
    hub.send("room", "said")
""",
    "with a hub in a cycle": """
hub.cycle = hub
hub.send("room", "said")
del hub
""",
}


@each_broker
@pytest.mark.parametrize("when", ENDS)
async def test_a_program_ends(kind: BrokerKind, when: str) -> None:
    """At once, with nothing left open, and what was sent before arrives."""
    async with scene(kind) as at, at.member() as ada:
        await welcome(ada)
        status, output = await run(ENDS[when], at.broker.url)
        assert (status, output) == ((3, "an error\n") if "error" in when else (0, ""))
        assert await heard(ada) == ("said", None)


QUIETLY = """
def quietly():
    try:
        while True:  # A signal takes a moment to stop the broker.
            hub.send("room", "said")
    except PachinkoError:
        print("failed")
"""
FAILURES = {
    "the broker hangs before the first call": "os.kill(broker, signal.SIGSTOP)\nquietly()",
    "the broker hangs after a call": """
hub.send("room", "said")
os.kill(broker, signal.SIGSTOP)
quietly()
""",
    "a thread waits for a broker that hangs": """
os.kill(broker, signal.SIGSTOP)
def work():
    with contextlib.suppress(PachinkoError):
        hub.send("room", "said")
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)  # the thread waits by then; nobody can tell
print("failed")
""",
    "the broker is away": "os.kill(broker, signal.SIGKILL)\nquietly()",
}


@each_broker
@pytest.mark.parametrize("why", FAILURES)
async def test_a_program_ends_without_its_broker(kind: BrokerKind, why: str) -> None:
    """The end waits for a broker that does not answer a second or two, and leaves nothing open."""
    async with running(kind) as broker:
        assert broker.process is not None
        code = f"{QUIETLY}\nbroker = int(sys.argv[2])\n{FAILURES[why]}"
        status, output = await run(code, broker.url, str(broker.process.pid))
        broker.resume()
        assert status == 0
        assert [line for line in output.splitlines() if "trying again" not in line] == ["failed"]


INTERRUPTED = """
broker = int(sys.argv[2])
hub.send("nobody", "said")
os.kill(broker, signal.SIGSTOP)
timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
timer.start()
begun = time.monotonic()
try:
    while True:  # A signal takes a moment to stop the broker.
        hub.send("room", "said")
except KeyboardInterrupt:
    assert time.monotonic() - begun < 2
os.kill(broker, signal.SIGCONT)
threads = [threading.Thread(target=hub.send, args=("room", "said", n)) for n in range(4)]
[each.start() for each in threads]
[each.join() for each in threads]
"""


@each_broker
async def test_an_interrupt(kind: BrokerKind) -> None:
    """The call ends at once and nothing stays locked: other threads call."""
    async with scene(kind) as at, at.member() as ada:
        await welcome(ada)
        assert await run(INTERRUPTED, at.broker.url, str(at.broker.process.pid)) == (0, "")
        received: list[Any] = []
        while len(received) < 4:  # The broker may have got what was given up, and a gap may come.
            type, payload = await heard(ada)
            received += [payload] if type == "said" and payload is not None else []
        assert sorted(received) == [0, 1, 2, 3]
