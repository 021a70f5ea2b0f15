"""An agent that streams tokens: they can be stopped, and go on after a reload or a lost network.

uvicorn --app-dir examples tokens:app     # then open http://127.0.0.1:8000/
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import falcon
import falcon.asgi
from attrs.validators import max_len, min_len

from pachinko import Connection, Pachinko, message

PAUSE = 0.15  # seconds, in which a model would make the next token

app = falcon.asgi.App()
ws = Pachinko(app, "/ws", max_concurrent=2)
ws.client("/pachinko.js")


@message("ask")
class Ask:
    prompt: str = attrs.field(converter=str.strip, validator=[min_len(1), max_len(500)])


@ws.on(Ask, resumable=60)  # It goes on for a minute without its page.
async def answer(conn: Connection, msg: Ask) -> AsyncIterator[str]:
    words = f"You have asked: {msg.prompt} A model would think about it now.".split()
    try:
        for word in words * 5:
            yield f"{word} "
            await asyncio.sleep(PAUSE)
    finally:
        print("the model can stop")  # after the last token, on stop, or a minute after a departure


class Page:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.text = Path(__file__).with_suffix(".html").read_text("utf-8")


app.add_route("/", Page())
