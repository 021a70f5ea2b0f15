"""A room that browsers join by WebSocket, and that anybody can watch as server-sent events.

    python3 -m pip install ".[server]"                # in the checkout, once
    uvicorn --app-dir examples sse:app --timeout-graceful-shutdown 5
    curl -N http://127.0.0.1:8000/rooms/1/events      # in a second terminal

Then open http://127.0.0.1:8000/ and write something: the page sends by its WebSocket, and shows
what the same `curl` prints. `EventSource` comes back by itself when the server has ended it.
"""

import asyncio
import signal
from collections.abc import AsyncIterator

import falcon.asgi
import msgspec

from pachinko import Connection, Pachinko, hub, message

HEARTBEAT = 5.0  # seconds: Falcon notices with the next event that the client has gone
PAGE = """<!doctype html><title>Room 1</title><form><input autofocus></form><ul></ul><script>
const socket = new WebSocket(`${location.origin.replace("http", "ws")}/rooms/1`);
document.forms[0].onsubmit = (event) => {
  event.preventDefault();
  const text = document.querySelector("input").value;
  socket.send(JSON.stringify({ type: "say", payload: { text } }));
};
const events = new EventSource("/rooms/1/events");
const show = (text) => {
  document.querySelector("ul").append(
    Object.assign(document.createElement("li"), { textContent: text }));
};
events.addEventListener("said", (event) => show(JSON.parse(event.data).text));
events.addEventListener("gap", () => show("(something is missing here)"));
</script>"""

app = falcon.asgi.App()
ws = Pachinko(app, "/rooms/{room}")


@message("said")
class Said:
    text: str


@ws.connect
async def arrive(conn: Connection, room: str) -> None:
    await conn.join(f"room:{room}")


@ws.on("say")
async def say(conn: Connection, *, text: str) -> None:
    await hub.send(f"room:{conn.params['room']}", Said(text))


class Events:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, room: str) -> None:
        resp.cache_control = ["no-store"]
        resp.set_header("X-Accel-Buffering", "no")  # nginx passes each event on at once
        resp.sse = self.events(f"room:{room}")

    async def events(self, group: str) -> AsyncIterator[falcon.asgi.SSEvent | None]:
        async for envelope in hub.listen(group, heartbeat=HEARTBEAT):
            if envelope is None:
                yield None  # Falcon sends a comment.
            else:
                data = msgspec.json.encode(envelope.payload)  # "null" if there is none
                yield falcon.asgi.SSEvent(event=envelope.type, data=data)


class Page:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.text = PAGE


app.add_route("/rooms/{room}/events", Events())
app.add_route("/", Page())


@ws.worker
async def drain_first() -> None:
    """Drain at SIGTERM and Ctrl-C: uvicorn alone waits for as long as somebody watches."""
    stopping, loop = asyncio.Queue[signal.Signals](), asyncio.get_running_loop()
    uvicorns = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in uvicorns:
        loop.add_signal_handler(number, stopping.put_nowait, number)
    number = await stopping.get()
    await hub.drain(1)
    for each, handler in uvicorns.items():
        signal.signal(each, handler)
    signal.raise_signal(number)
