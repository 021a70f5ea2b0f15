"""What docs/files.md shows and claims, and the example that it names: run here."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import connect, new_app, simulated

from pachinko import Connection, Hub, Pachinko, PachinkoError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "files.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the files of the checkout")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's files, as a package that is imported anew."""
    package = tmp_path / "shop"
    package.mkdir()
    code = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    for name, text in code:
        (package / name).write_text(text)
    assert [name for name, _ in code] == ["database.py", "todos.py", "admin.py", "app.py"]
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("shop.app")
    yield sys.modules["shop"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def client(url: str, user: str) -> Any:
    return connect(f"{url}/ws", additional_headers={"Authorization": f"Bearer {user}"})


async def test_the_pages_app(shop: Any) -> None:
    """Handlers of two files share a database, and each has its own middleware."""
    async with simulated(shop.app.create_app()) as server, client(server.url, "ada") as ada:
        await ada.send("todo.add", {"text": "milk"}, id=1)
        assert [(await ada.receive())["type"] for _ in range(2)] == ["added", "todo.add.reply"]
        assert shop.admin.log == []
        answer = await ada.ask("admin.remove", {"line": "wrong"})
        assert answer["payload"]["code"] == "forbidden"
        async with client(server.url, "admin") as admin:
            assert (await admin.ask("todo.list"))["payload"] == ["milk"]
            assert (await admin.ask("admin.remove", {"line": 0}))["payload"] == "milk"
            assert (await admin.ask("admin.remove", {"line": 0}))["payload"]["code"] == "not_found"
    assert shop.admin.log == ["admin.remove", "admin.remove"]


async def test_two_apps_of_the_page_share_nothing(shop: Any) -> None:
    """The factory makes what differs, while the files are imported once."""
    for _ in range(2):
        async with simulated(shop.app.create_app()) as server, client(server.url, "ada") as ada:
            assert (await ada.ask("todo.list"))["payload"] == []
            await ada.send("todo.add", {"text": "milk"})
            assert (await ada.receive())["payload"] == {"text": "milk"}


async def other(conn: Connection) -> None: ...


async def enter(conn: Connection, room: str) -> None: ...


def rows() -> list[tuple[str, str]]:
    part = PAGE.read_text().partition("\n## Mistakes\n")[2]
    found = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", part, re.M)
    assert len(found) == len(re.findall(r"^\| ", part, re.M)) - 1
    return found


@pytest.mark.parametrize(("code", "text"), rows() if PAGE.exists() else [])
def test_each_mistake_is_told(shop: Any, code: str, text: str) -> None:
    """The table shows what the error says."""
    app = new_app()

    names = {
        "Hub": Hub, "Pachinko": Pachinko, "app": app, "enter": enter, "other": other,
        "rooms": Pachinko(), "todos": shop.todos, "ws": Pachinko(app, "/ws"),
    }  # fmt: skip
    with pytest.raises(PachinkoError) as caught:
        exec(code, names)
    assert text in str(caught.value)


def test_the_examples_own_tests_pass() -> None:
    """They are run as the example says, from the folder above it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "several_files"],
        cwd=ROOT / "examples", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_factory_is_where_the_example_says() -> None:
    """uvicorn finds it from the folder above."""
    text = (ROOT / "examples" / "several_files" / "__init__.py").read_text()
    module, _, name = re.findall(r"uvicorn --factory (\S+?)(:)(\w+)", text)[0]
    command = f"from {module} import {name}; {name}()"
    folder = ROOT / "examples"  # uvicorn puts the current one first on the path
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-c", command], cwd=folder, env=environment, check=True)
