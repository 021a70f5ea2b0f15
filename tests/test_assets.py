"""The browsers' client as the module serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import falcon.asgi
import falcon.testing
import pytest

import pachinko
from pachinko import Hub, Pachinko, PachinkoError

FILE = Path(pachinko.__file__).with_name("client") / "pachinko.js"


@pytest.fixture
def http() -> falcon.testing.TestClient:
    """A client of an app that serves the file."""
    app: falcon.asgi.App[Any, Any] = falcon.asgi.App()
    Pachinko(app, "/ws", hub=Hub()).client("/lib/pachinko.js")
    return falcon.testing.TestClient(app)


def test_the_client_is_served(http: falcon.testing.TestClient) -> None:
    """It is the file of the project, as a script, and browsers ask whether it has changed."""
    answer = http.get("/lib/pachinko.js")
    assert answer.status_code == 200
    assert answer.content == FILE.read_bytes()
    assert answer.headers["content-type"] == "text/javascript"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["etag"].startswith('"')


@pytest.mark.parametrize("known", ["{}", "W/{}", '"other", {}', "*"])
def test_who_has_the_client_does_not_get_it_again(
    http: falcon.testing.TestClient, known: str
) -> None:
    """The answer to a tag that fits is 304, without the file."""
    tag = http.get("/lib/pachinko.js").headers["etag"]
    answer = http.get("/lib/pachinko.js", headers={"If-None-Match": known.format(tag)})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == tag


def test_another_client_is_sent(http: falcon.testing.TestClient) -> None:
    """Whoever has an older one gets the new one."""
    answer = http.get("/lib/pachinko.js", headers={"If-None-Match": '"older"'})
    assert (answer.status_code, answer.content) == (200, FILE.read_bytes())


def test_head_has_no_body(http: falcon.testing.TestClient) -> None:
    """The headers are those of GET."""
    get, head = http.get("/lib/pachinko.js"), http.head("/lib/pachinko.js")
    assert (head.status_code, head.content) == (200, b"")
    names = ("content-type", "content-length", "etag", "cache-control")
    assert [head.headers[name] for name in names] == [get.headers[name] for name in names]


@pytest.mark.parametrize("path", ["pachinko.js", "", None, 7])
def test_the_path_has_to_be_one(path: Any) -> None:
    """The error shows the lines to write."""
    ws = Pachinko(falcon.asgi.App(), "/ws", hub=Hub())
    with pytest.raises(PachinkoError, match=r"got .*\n.*\nws\.client\(\"/pachinko\.js\"\)"):
        ws.client(path)


def test_an_endpoint_without_an_app_serves_nothing() -> None:
    """There is nothing that a route could be added to."""
    with pytest.raises(PachinkoError, match="needs an app"):
        Pachinko().client("/pachinko.js")


def test_a_module_that_was_copied_alone_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the folder beside it the route is refused, and the error says where it belongs."""
    monkeypatch.setattr(pachinko, "_ASSETS", tmp_path / "client")
    with pytest.raises(PachinkoError, match=r"copy the folder client/ beside the module") as raised:
        Pachinko(falcon.asgi.App(), "/ws", hub=Hub()).client("/pachinko.js")
    assert str(tmp_path / "client" / "pachinko.js") in str(raised.value)
