"""An echo: every frame goes back unchanged, text as text and bytes as bytes.

    python3 -m pip install ".[server]"      # in the checkout, once
    python3 examples/echo.py                # at ws://127.0.0.1:8000/echo, or as HOST and PORT say
    uvicorn --app-dir examples echo:app     # the same app, with uvicorn's own options

No message type has a handler here, so the fallback gets all text, valid messages included, but for
the types that belong to the library, such as ``complete``. What a fallback or a binary handler
returns is sent as it is.
"""

import os

import falcon.asgi
import uvicorn

from pachinko import Connection, Pachinko

app = falcon.asgi.App()
ws = Pachinko(app, "/echo", max_size=16 * 2**20)  # as much as most servers take by default


@ws.fallback
async def echo_text(conn: Connection, frame: str) -> str:
    return frame


@ws.binary
async def echo_bytes(conn: Connection, data: bytes) -> bytes:
    return data


if __name__ == "__main__":
    host, port = os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "8000"))
    uvicorn.run(app, host=host, port=port)
