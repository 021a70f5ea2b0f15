"""The smallest page of pachinko.js. Run ``uvicorn --app-dir examples live:app``; open two tabs."""

from pathlib import Path

import falcon
import falcon.asgi

from pachinko import Connection, Pachinko, hub

hub.keep("all")  # Who comes back gets what was said meanwhile.
app = falcon.asgi.App()
ws = Pachinko(app, "/ws")
ws.client("/pachinko.js")


@ws.on("say")
async def say(conn: Connection, *, text: str) -> None:
    await hub.send("all", "said", text)


@ws.connect
async def arrive(conn: Connection) -> None:
    await conn.join("all")


class Page:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.text = Path(__file__).with_suffix(".html").read_text()


app.add_route("/", Page())
