"""The endpoint as a Falcon resource: attaching, the handshake, the lifespan."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import falcon
import falcon.asgi
import pytest
import websockets.exceptions
from support import PATIENCE, Stalled, connect, new_app, serving, simulated, until

import pachinko
from pachinko import Close, Connection, Hub, Pachinko, PachinkoError, hub


async def refused(url: str, **options: Any) -> int:
    """The HTTP status with which the handshake at *url* is refused."""
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        async with connect(url, **options):
            pass
    status: int = caught.value.response.status_code
    return status


# Attaching


@pytest.mark.parametrize("with_middleware", [True, False])
async def test_it_works_as_a_falcon_resource_without_app_and_path(with_middleware: bool) -> None:
    """`app.add_route("/ws", Pachinko())` is enough; the lifespan is a line more."""
    app, ws = new_app(), Pachinko(hub=Hub())
    started: list[str] = []

    @ws.worker
    async def work() -> None:
        started.append("worker")

    @ws.connect
    async def arrive(conn: Connection, room: str) -> None:
        await conn.send("hello", {"room": room})

    app.add_route("/ws/{room}", ws)
    if with_middleware:
        app.add_middleware(ws)
    async with simulated(app) as server:
        if with_middleware:
            await until(lambda: started)
        assert bool(started) is with_middleware
        async with connect(server.url + "/ws/a") as client:
            assert await client.receive() == {"type": "hello", "payload": {"room": "a"}}
            await until(lambda: started)


async def test_several_endpoints_share_an_app_and_a_hub() -> None:
    """Two endpoints and a raw Falcon route live beside each other."""
    app, shared = new_app(), Hub()
    one, two = Pachinko(app, "/one", hub=shared), Pachinko(app, "/two", hub=shared)

    class Raw:
        async def on_websocket(self, req: Any, ws: Any) -> None:
            await ws.accept()
            await ws.send_text("raw " + await ws.receive_text())

    app.add_route("/raw", Raw())
    for ws in (one, two):

        @ws.connect
        async def arrive(conn: Connection) -> None:
            await conn.join("both")

    async with (
        simulated(app) as server,
        connect(server.url + "/one") as first,
        connect(server.url + "/two") as second,
        connect(server.url + "/raw") as raw,
    ):
        await shared.send("both", "hi", {})
        assert await first.receive() == await second.receive()
        await raw.raw("text")
        assert await raw.socket.recv() == "raw text"


async def test_a_later_route_that_replaces_it_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Falcon lets the last `add_route` win; the log says that ours is not called."""
    app = new_app()
    Pachinko(app, "/ws", hub=Hub())
    Pachinko(app, "/other", hub=Hub())

    class Raw:
        async def on_websocket(self, req: Any, ws: Any) -> None:
            await ws.accept()
            await ws.send_text("raw")

    app.add_route("/ws", Raw())
    async with simulated(app) as server, connect(server.url + "/ws") as client:
        assert await client.socket.recv() == "raw"
    assert [r.getMessage() for r in caplog.records if r.name == "pachinko"] == [
        "a later app.add_route has replaced the Pachinko at /ws"
    ]


async def test_a_subclass_is_an_endpoint_too() -> None:
    """Deriving from `Pachinko` changes nothing about routing."""

    class Own(Pachinko):
        pass

    app = new_app()
    Own(app, "/ws", hub=Hub())
    with pytest.raises(PachinkoError, match="has a Pachinko already"):
        Pachinko(app, "/ws")
    async with simulated(app) as server, connect(server.url + "/ws"):
        pass


# The handshake


@pytest.mark.parametrize("name", ["ws", "req", "self", "conn", "function"])
async def test_path_parameters_may_have_any_name(name: str) -> None:
    """`/{ws}` and the like reach `conn.params`."""
    app = new_app()
    ws = Pachinko(app, f"/{{{name}}}/{{n:int}}", hub=Hub())

    @ws.connect
    async def arrive(conn: Connection, **params: Any) -> None:
        await conn.send("params", [conn.params, params])

    async with simulated(app) as server, connect(server.url + "/x/7") as client:
        own = {name: "x", "n": 7}
        params = {k: v for k, v in own.items() if k != "conn"}
        assert (await client.receive())["payload"] == [own, params]


async def test_falcons_middleware_and_context_work_around_it() -> None:
    """`process_request_ws`, `process_resource_ws` and `req.context` are Falcon's as ever."""
    app = new_app()
    ws = Pachinko(app, "/ws/{room}", hub=Hub())

    class Middleware:
        async def process_request_ws(self, req: Any, socket: Any) -> None:
            req.context.order = ["request"]

        async def process_resource_ws(
            self, req: Any, socket: Any, resource: Any, params: Any
        ) -> None:
            assert resource is ws
            req.context.order.append(params["room"])

    app.add_middleware(Middleware())

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.send("order", conn.context.order)

    async with simulated(app) as server, connect(server.url + "/ws/a") as client:
        assert (await client.receive())["payload"] == ["request", "a"]


async def test_a_middleware_may_have_accepted_already() -> None:
    """Then the connection is served without a second accept."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())

    class Accepting:
        async def process_request_ws(self, req: Any, socket: Any) -> None:
            await socket.accept()
            await socket.send_text("from the middleware")

    app.add_middleware(Accepting())

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.send("hello", {})
        if "refuse" in conn.req.params:
            raise Close(4000, "no")

    async with simulated(app) as server:
        async with connect(server.url + "/ws") as client:
            assert await client.socket.recv() == "from the middleware"
            assert (await client.receive())["type"] == "hello"
        async with connect(server.url + "/ws?refuse=1") as client:
            assert await client.closed() == (4000, "no")


async def test_a_middleware_may_have_closed_already() -> None:
    """Then no handler of ours runs."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    called: list[str] = []

    class Closing:
        async def process_request_ws(self, req: Any, socket: Any) -> None:
            await socket.close()

    app.add_middleware(Closing())

    @ws.connect
    async def arrive(conn: Connection) -> None:
        called.append("connect")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        called.append("disconnect")

    async with simulated(app) as server:
        assert await refused(server.url + "/ws") == 403
    assert called == []


async def test_connect_handlers_run_in_order_before_the_handshake_is_answered() -> None:
    """What they send is held and delivered after accept, in order and without a bound."""
    app = new_app()
    ws = Pachinko(app, "/ws/{a}/{b:int}", hub=Hub(), outbox=2)

    @ws.connect
    async def first(conn: Connection, b: int) -> None:
        assert not ws._hub.connections and not ws._hub.members("room")
        await conn.join("room")
        for n in range(100):
            await conn.send("history", n)

    @ws.connect
    async def second(conn: Connection, a: str, b: int, c: str = "default") -> None:
        await ws._hub.send("room", "group", [a, b, c])
        await ws._hub.send_to(conn, "direct", 0)

    async with simulated(app) as server, connect(server.url + "/ws/x/1") as client:
        got = [await client.receive() for _ in range(102)]
        assert [m["payload"] for m in got[:100]] == list(range(100))
        assert got[100] == {"type": "group", "group": "room", "payload": ["x", 1, "default"]}
        assert len(ws._hub.connections) == len(ws._hub.members("room")) == 1


async def test_an_http_error_in_connect_goes_through_falcons_error_handlers() -> None:
    """The handshake is refused, nothing that was sent goes out, no disconnect handler runs."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    seen: list[Any] = []

    async def handle(req: Any, resp: Any, ex: Any, params: Any, ws: Any = None) -> None:
        seen.append((ex, ws.unaccepted))
        await ws.close(4999)

    app.add_error_handler(falcon.HTTPForbidden, handle)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("room")
        conn.user = "ann"
        await conn.send("never", {})
        raise {"own": falcon.HTTPForbidden(), "plain": falcon.HTTPNotFound(), "bug": KeyError()}[
            conn.req.params["why"]
        ]

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        seen.append("disconnect")

    async with simulated(app) as server:
        for why, status in (("own", 403), ("plain", 404), ("bug", 403)):
            assert await refused(f"{server.url}/ws?why={why}") == status
        assert (
            not ws._hub.groups
            and not ws._hub.state.registry.connections
            and not ws._hub.state.registry.users
        )
    assert len(seen) == 1 and isinstance(seen[0][0], falcon.HTTPForbidden) and seen[0][1]


async def test_close_in_connect_accepts_and_closes() -> None:
    """A browser can read the code and the reason, and nothing else is sent."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    called: list[str] = []

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.send("never", {})
        raise Close(4003, "full")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        called.append("disconnect")

    async with simulated(app) as server, connect(server.url + "/ws") as client:
        assert await client.closed() == (4003, "full")
    assert called == []


async def test_conn_close_in_connect_closes_after_accept() -> None:
    """What was sent before still goes out, and the disconnect handlers run."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    codes: list[int | None] = []

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.send("bye", {})
        await conn.close(4004)
        await conn.send("too late", {})
        assert not ws._hub.connections

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    async with simulated(app) as server, connect(server.url + "/ws") as client:
        assert (await client.receive())["type"] == "bye"
        assert (await client.closed())[0] == 4004
        await until(lambda: codes)
    assert codes == [4004]


async def test_a_refused_connection_is_over() -> None:
    """Whatever a connect handler has left behind learns that there is no client."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    refused_ones: list[Connection] = []

    @ws.connect
    async def arrive(conn: Connection) -> None:
        refused_ones.append(conn)
        raise falcon.HTTPForbidden

    async with simulated(app) as server:
        assert await refused(server.url + "/ws") == 403
        (conn,) = refused_ones
        await until(lambda: not ws._hub.state.serving)
        assert conn.closed
        with pytest.raises(falcon.WebSocketDisconnected):
            await conn.send("late", {})
        with pytest.raises(PachinkoError):
            conn.user = "ann"


async def test_a_group_closed_during_connect_tells_the_reason() -> None:
    """A connect handler that goes on sending is not a refusal without a reason."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("room")
        await ws._hub.close_group("room", 4000, "closed")
        await conn.send("history", {})

    async with simulated(app) as server, connect(server.url + "/ws") as client:
        assert await client.closed() == (4000, "closed")


@pytest.mark.parametrize("closing", [False, True])
async def test_a_failed_accept_runs_the_disconnect_handlers(closing: bool) -> None:
    """The client that has left during connect was let in, and is seen out."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    codes: list[int | None] = []
    arrived, gate = asyncio.Event(), asyncio.Event()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        if closing:
            await conn.close(4001)
        arrived.set()
        await gate.wait()

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    async with serving(app) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        await asyncio.wait_for(arrived.wait(), PATIENCE)
        writer.transport.abort()
        await until(lambda: not server.uvicorn.server_state.connections)
        gate.set()
        await until(lambda: codes and not ws._hub.state.serving)
    assert codes == [4001 if closing else 1006]


async def test_an_accept_that_the_server_refuses_is_an_error_after_disconnect() -> None:
    """A server's own error is raised to Falcon once the disconnect handlers have run."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    codes: list[int | None] = []

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    async def no_accept(scope: Any, receive: Any, send: Any) -> None:
        async def refuse(event: Any) -> None:
            if event["type"] == "websocket.accept":
                raise RuntimeError("the server's own")
            await send(event)

        await app(scope, receive, refuse if scope["type"] == "websocket" else send)

    async with simulated(no_accept) as server:
        assert await refused(server.url + "/ws") == 403
    assert codes == [1006]

    @ws.connect
    async def arrive(conn: Connection) -> None:
        raise Close(4000)

    async with simulated(no_accept) as server:
        assert await refused(server.url + "/ws") == 403
    assert codes == [1006]  # without those of a client that was not let in


async def test_the_first_of_our_subprotocols_that_the_client_offers_is_chosen() -> None:
    """Ours is the order of preference; none in common means none."""
    app = new_app()
    Pachinko(app, "/ws", hub=Hub(), subprotocols=["v2", "v1"])
    async with simulated(app) as server:
        for offered, chosen in ((["v1", "v2"], "v2"), (["v1"], "v1"), (["v0"], None), (None, None)):
            async with connect(server.url + "/ws", subprotocols=offered) as client:
                assert client.socket.subprotocol == chosen


async def test_the_user_is_set_in_connect_and_fixed_after() -> None:
    """`conn.user` belongs to the handshake; changing it later or to no text is refused."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.connect
    async def arrive(conn: Connection) -> None:
        with pytest.raises(TypeError, match="str"):
            conn.user = 5  # type: ignore[assignment]
        conn.user = "bob"
        conn.user = conn.req.get_param("user")

    async with (
        simulated(app) as server,
        connect(server.url + "/ws?user=ann") as one,
        connect(server.url + "/ws?user=ann") as two,
        connect(server.url + "/ws") as other,
    ):
        await ws._hub.send_to_user("ann", "hi", {})
        await ws._hub.send_to_user("bob", "hi", {})
        await ws._hub.broadcast("end", {})
        for client in (one, two):
            assert [(await client.receive())["type"] for _ in range(2)] == ["hi", "end"]
        assert (await other.receive())["type"] == "end"
        conn = next(iter(ws._hub.connections))
        with pytest.raises(PachinkoError, match="connect handler"):
            conn.user = "eve"


# ASGI middleware around the app

tenant = contextvars.ContextVar("tenant", default="nobody")


@pytest.mark.parametrize("wrapper", ["timeout", "context"])
async def test_asgi_middleware_around_send_harms_nobody(wrapper: str) -> None:
    """One stalled client under a wrapper of `send` costs only itself."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub(), linger=0.05, send_timeout=60.0)
    codes: list[int | None] = []

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("all")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    @ws.on("flood")
    async def flood(conn: Connection, count: int) -> str:
        for _ in range(count):
            await ws._hub.send("all", "data", "x" * 50_000)
            await asyncio.sleep(0)
        return "unharmed"

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_timeout(event: Any) -> None:
            async with asyncio.timeout(0.3):
                await send(event)

        async def send_with_context(event: Any) -> None:
            token = tenant.set("somebody")
            try:
                await send(event)
            finally:
                tenant.reset(token)

        wrappers = {"timeout": send_with_timeout, "context": send_with_context}
        await app(scope, receive, wrappers[wrapper] if scope["type"] == "websocket" else send)

    async with (
        serving(wrapped) as server,
        connect(server.url + "/ws", max_queue=None) as client,
        Stalled(server.url + "/ws"),
    ):
        await until(lambda: len(ws._hub.members("all")) == 2)
        await client.send("flood", 200, id=1)
        received = [await client.receive() for _ in range(201)]
        assert received[-1]["payload"] == "unharmed"
        await until(lambda: codes)
        assert len(ws._hub.connections) == 1


# The lifespan


async def test_workers_run_with_the_app_and_end_with_it() -> None:
    """A worker starts with the app and is cancelled at shutdown."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    events: list[str] = []

    @ws.worker
    async def clock() -> None:
        events.append("started")
        try:
            await asyncio.Event().wait()
        finally:
            events.append("ended")

    async with simulated(app):
        await until(lambda: events)

        @ws.worker
        async def later() -> None:
            events.append("later")

        await until(lambda: "later" in events)
    assert events == ["started", "later", "ended"]


@pytest.mark.parametrize("backoffs", [(0.0, 0.01, 60.0, 60.0), (0.01, 0.0)])
async def test_a_failed_worker_is_logged_and_started_again(
    backoffs: tuple[float, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back after a pause that grows; one that returns has done its work."""
    monkeypatch.setattr(pachinko, "_BACKOFFS", backoffs)
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    runs: list[int] = []

    @ws.worker
    async def flaky() -> None:
        runs.append(len(runs))
        if len(runs) < 3:
            raise RuntimeError("flaky")

    async with simulated(app):
        await until(lambda: len(runs) == 3 and not ws._workers)
    assert caplog.text.count("worker") >= 2 and "flaky" in caplog.text


async def test_a_worker_survives_a_stray_cancelled_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Awaiting something cancelled is a failure like any other."""
    monkeypatch.setattr(pachinko, "_BACKOFFS", (0.0,))
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    runs: list[int] = []

    @ws.worker
    async def flaky() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise asyncio.CancelledError

    async with simulated(app):
        await until(lambda: len(runs) == 2 and not ws._workers)
    assert "worker" in caplog.text


async def test_without_a_lifespan_workers_start_with_the_first_connection() -> None:
    """A server without lifespan support is served all the same."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    runs: list[str] = []

    @ws.worker
    async def work() -> None:
        runs.append("run")

    async with serving(app, lifespan="off") as server:
        assert runs == []
        for _ in range(2):
            async with connect(server.url + "/ws"):
                await until(lambda: runs)
    assert runs == ["run"]
    async with serving(app, lifespan="off") as server, connect(server.url + "/ws"):
        pass


async def test_shutdown_closes_what_the_server_has_left_open() -> None:
    """A lifespan that ends first closes the connections with 1012 and waits for them."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    other = Pachinko(app, "/other", hub=ws._hub)
    codes: list[int | None] = []

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    async with (
        serving(app) as server,
        connect(server.url + "/ws") as client,
        connect(server.url + "/other"),
    ):
        await ws.process_shutdown({}, {})
        assert (await client.closed())[0] == 1012
        assert codes == [1012] and len(ws._hub.connections) == 1
        await other.process_shutdown({}, {})
        assert ws._hub.state.loop is None


async def test_a_responder_cancelled_by_the_server_runs_its_disconnect_handlers() -> None:
    """A grace period that is over cancels the responder; disconnect handlers run all the same."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub(), linger=60.0)
    events: list[str] = []
    started = asyncio.Event()

    @ws.on("handler")
    async def handler(conn: Connection) -> None:
        started.set()
        await asyncio.Event().wait()

    @ws.on("concurrent", concurrent=True)
    async def concurrent(conn: Connection) -> None:
        await asyncio.Event().wait()

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        await asyncio.sleep(0)
        events.append("left")

    async with (
        serving(app, timeout_graceful_shutdown=1) as server,
        connect(server.url + "/ws") as client,
    ):
        await client.send("concurrent", id=1)
        await client.send("handler", id=2)
        await asyncio.wait_for(started.wait(), PATIENCE)
        await server.stop()
        await until(lambda: not ws._hub.state.serving)
    assert events == ["left"]


async def test_a_responder_cancelled_while_idle_runs_its_disconnect_handlers() -> None:
    """A cancellation while it reads is passed on after the disconnect handlers."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    codes: list[int | None] = []

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    async with simulated(app) as server, connect(server.url + "/ws"):
        (task,) = ws._hub.state.serving
        task.cancel()
        await until(task.done)
        assert codes == [1006] and task.cancelling()


def test_the_module_hub_holds_no_loop_before_and_after() -> None:
    """`hub` starts with the first app and is clean again after the last one stops."""
    app = new_app()
    ws = Pachinko(app, "/ws")

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await hub.join("room", conn)

    async def once() -> None:
        async with simulated(app) as server, connect(server.url + "/ws"):
            await until(lambda: hub.groups)
            assert hub.stats()["connections"] == 1

    for _ in range(2):
        asyncio.run(once())
        assert hub.state.loop is None and not hub.groups and not hub.connections
        assert set(hub.stats().values()) == {0}


async def test_a_hub_serves_one_loop_at_a_time() -> None:
    """A second app in another loop is told to take a hub of its own."""
    shared = Hub()
    first = Pachinko(new_app(), "/ws", hub=shared)
    second = Pachinko(new_app(), "/ws", hub=shared)
    first._start()
    first._start()
    with pytest.raises(PachinkoError, match=r"hub=Hub\(\)"):
        await asyncio.to_thread(asyncio.run, second.process_startup({}, {}))
    await first.process_shutdown({}, {})


async def test_sys_exit_in_connect_refuses_the_handshake(caplog: pytest.LogCaptureFixture) -> None:
    """Like any other bug there; the server goes on."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.connect
    async def arrive(conn: Connection) -> None:
        match conn.req.get_param("bad"):
            case "exit":
                raise SystemExit(3)
            case "cancelled":
                raise asyncio.CancelledError

    async with simulated(app) as server:
        for bad in ("exit", "cancelled"):
            assert await refused(f"{server.url}/ws?bad={bad}") == 403
        async with connect(server.url + "/ws"):
            pass
    assert "a connect handler has raised CancelledError()" in caplog.text
    assert "a connect handler has raised SystemExit(3)" in caplog.text


async def test_sys_exit_in_a_worker_starts_it_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like any other failure there."""
    monkeypatch.setattr(pachinko, "_BACKOFFS", (0.0,))
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    starts: list[int] = []

    @ws.worker
    async def work() -> None:
        starts.append(1)
        if len(starts) < 3:
            raise SystemExit(3)

    async with simulated(app):
        await until(lambda: len(starts) == 3)
    assert caplog.text.count("SystemExit: 3") == 2


async def test_close_in_connect_after_closing_is_too_late() -> None:
    """The first close is what the client sees, with what was sent before it."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.send("last")
        await conn.close(4001, "first")
        raise Close(4002, "second")

    async with simulated(app) as server, connect(server.url + "/ws") as client:
        assert (await client.receive())["type"] == "last"
        assert await client.closed() == (4001, "first")
