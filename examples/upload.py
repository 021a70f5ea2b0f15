"""Uploads with progress; a small picture is shown to everybody who has the page open.

    python3 -m pip install ".[server]"      # in the checkout, once
    python3 examples/upload.py              # at http://127.0.0.1:8000/, or as HOST and PORT say

A client sends ``upload.begin``, the content in binary frames, and ``upload.end``, which is answered
with the size and the SHA-256. Each frame is answered with ``progress`` once it is on the disk. All
are handled in their order, so that no frame gets into another upload. Files are named by their
SHA-256, in the folder UPLOADS or in a new one. Who can open the page can fill the disk: put
`authenticate` in front of such an app.
"""

import asyncio
import hashlib
import json
import os
import secrets
import tempfile
import threading
from pathlib import Path

import falcon.asgi
import uvicorn

from pachinko import Connection, MessageError, Pachinko, hub, message

MAX_SIZE = 100 * 2**20  # bytes of a file
SHOWN = 900_000  # bytes of a picture that is shown; NATS takes messages of 1 MiB by default

app = falcon.asgi.App()
ws = Pachinko(app, "/ws", outbox_bytes=10 * SHOWN)  # room for ten, where a client is behind
folder = Path(os.environ.get("UPLOADS") or tempfile.mkdtemp(prefix="uploads-"))


@message("progress")
class Progress:
    size: int  # bytes that are on the disk


class Upload:
    """A file that is being written. Its methods run in threads, which may outlive a handler."""

    def __init__(self, name: str, size: int, type: str) -> None:
        self.name, self.announced, self.type = name, size, type
        self.size, self.hash, self.lock = 0, hashlib.sha256(), threading.Lock()
        self.is_over = False
        self.path = folder / f"{secrets.token_hex(16)}.part"  # The client's name is only shown.

    def write(self, data: bytes) -> None:
        with self.lock:
            if not self.is_over:
                with self.path.open("ab") as file:
                    file.write(data)
                self.hash.update(data)
                self.size += len(data)

    def end(self, *, keep: bool = False) -> None:
        with self.lock:
            if keep:
                self.path.touch()  # An empty file has had no frame.
                self.path.replace(folder / self.hash.hexdigest())
            self.path.unlink(missing_ok=True)
            self.is_over = True  # A thread that is late writes nothing.


@ws.connect
async def arrive(conn: Connection) -> None:
    conn.context.upload = None
    await conn.join("everybody")


@ws.on("upload.begin")
async def begin(conn: Connection, *, name: str, size: int, type: str = "") -> None:
    if conn.context.upload is not None:
        raise MessageError("busy", "one upload at a time")
    if not 0 <= size <= MAX_SIZE:
        raise MessageError("too_large", f"a file has at most {MAX_SIZE:,} bytes")
    conn.context.upload = Upload(name[:200], size, type[:100])


@ws.on("upload.abort")
@ws.disconnect
async def end(conn: Connection) -> None:
    if (upload := conn.context.upload) is not None:
        await asyncio.to_thread(upload.end)
        conn.context.upload = None  # Not before: if this is cancelled, it is called once more.


@ws.binary
async def write(conn: Connection, data: bytes) -> Progress:
    upload: Upload | None = conn.context.upload
    try:
        if upload is None or upload.size + len(data) > upload.announced:
            raise MessageError("too_many", "more bytes have come than were announced")
        await asyncio.to_thread(upload.write, data)
    except BaseException:  # The disk may be full, or the client may have gone.
        await end(conn)
        raise
    return Progress(upload.size)


@ws.on("upload.end")
async def finish(conn: Connection) -> dict[str, str | int]:
    upload: Upload | None = conn.context.upload
    try:
        if upload is None or upload.size != upload.announced:
            raise MessageError("incomplete", "not all bytes of the file have come")
        await asyncio.to_thread(upload.end, keep=True)
    finally:
        await end(conn)
    sha256 = upload.hash.hexdigest()
    if upload.type.startswith("image/") and upload.size <= SHOWN:
        # Bytes have no type. What a client has to know of them stands in front, with its length.
        head = json.dumps({"name": upload.name, "type": upload.type, "sha256": sha256}).encode()
        content = await asyncio.to_thread((folder / sha256).read_bytes)
        await hub.send("everybody", len(head).to_bytes(4) + head + content)
    return {"size": upload.size, "sha256": sha256}


class Page:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.text = Path(__file__).with_name("upload.html").read_text("utf-8")


app.add_route("/", Page())

if __name__ == "__main__":
    host, port = os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "8000"))
    uvicorn.run(app, host=host, port=port)
