"""Who may connect: the origins of browsers' pages, and authentication."""

from __future__ import annotations

from typing import Any

import falcon
import falcon.asgi
import falcon.testing
import pytest
import websockets.exceptions
from hypothesis import given
from hypothesis import strategies as st
from support import connect, new_app, serving

import pachinko
from pachinko import Connection, Hub, Pachinko, PachinkoError


def endpoint(path: str = "/ws", **options: Any) -> Pachinko:
    return Pachinko(new_app(), path, hub=Hub(), **options)


def refusal(origins: Any = None, trust_forwarded: Any = False, **scope: Any) -> str | None:
    """Why a handshake with these headers, as in ``origin="…"``, is refused."""
    scheme, path = scope.pop("scheme", "ws"), scope.pop("path", "/ws")
    headers = [
        (name.replace("_", "-"), value)
        for name, values in {"host": "example.com", **scope}.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    made = falcon.testing.create_scope_ws(path=path, headers=headers, scheme=scheme)
    made["headers"] = [(n.encode(), v.encode("latin1")) for n, v in headers]
    req = falcon.asgi.Request(made, None)  # type: ignore[arg-type]
    return pachinko.read_origins(origins, trust_forwarded).refusal(req)


# The request's own host


@pytest.mark.parametrize(
    ("origin", "scheme", "host", "same"),
    [
        ("https://example.com", "wss", "example.com", True),
        ("https://example.com", "wss", "example.com:443", True),
        ("https://example.com:443", "wss", "example.com", True),
        ("http://example.com:80", "ws", "EXAMPLE.com", True),
        ("HTTP://Example.COM", "ws", "example.com", True),
        ("https://example.com:8443", "wss", "example.com:8443", True),
        ("http://[::1]:8000", "ws", "[::1]:8000", True),
        ("http://my_host-1", "ws", "my_host-1", True),
        # TLS may have ended at a proxy, but never begins there.
        ("https://example.com", "ws", "example.com", True),
        ("https://example.com", "http", "example.com", True),
        ("http://example.com", "wss", "example.com", False),
        ("http://example.com", "https", "example.com", False),
        ("https://example.com", "wss", "example.com:80", False),
        ("http://example.com", "ws", "example.com:443", False),
        ("http://example.com:8000", "ws", "example.com", False),
        ("http://example.com", "ws", "www.example.com", False),
        ("http://www.example.com", "ws", "example.com", False),
        ("http://example.com", "ws", "example.com.", False),
        ("ftp://example.com", "ws", "example.com", False),
        ("chrome-extension://abcdef", "ws", "abcdef", False),
        ("https://example.com", "wss", "", False),
        ("https://example.com", "wss", "example.com:port", False),
        ("https://example.com", "wss", "user@example.com", False),
        ("https://example.com", "wss", "example.com, example.com", False),
    ],
)
def test_the_own_host(origin: str, scheme: str, host: str, same: bool) -> None:
    """A page of the host that it connects to is let in; default ports may be left out."""
    parsed = pachinko.parse_origin(origin)
    assert parsed is not None
    assert pachinko.is_same_host(parsed, scheme, host) is same
    assert (refusal(origin=origin, scheme=scheme, host=host) is None) is same


@pytest.mark.parametrize(
    "origin",
    [
        "", " ", "example.com", "//example.com", "https:example.com", "https://",
        "https://example.com/", "https://example.com/chat", "https://example.com?x",
        "https://example.com#x", "https://user@example.com", "https://example.com:",
        "https://example.com:port", "https://example.com:65536", "https://example.com:123456",
        "https://example.com ",
        "https://example.com https://example.com", "https://example.com\n", "https://exa\tmple.com",
        "https://.example.com", "https://a..example.com",
        "https://example.com\\@evil.example", "https://[::1", "https://::1", "file:///x",
        "https://*.example.com", "https://ex\xe4mple.com",
    ],
)  # fmt: skip
@pytest.mark.parametrize("origins", [None, ["https://example.com", "https://*.example.com"]])
def test_what_is_no_origin_is_refused(origin: str, origins: Any) -> None:
    """No page can have sent that, or only one of no site; the log says what would let it in."""
    text = refusal(origins, origin=origin)
    assert text == (f"{origin!r} at '/ws': it names no site; only origins=\"*\" would let it in")
    assert refusal("*", origin=origin) is None


@pytest.mark.parametrize("origin", ["null", "file://"])
def test_pages_of_no_site_are_let_in_only_by_name(origin: str) -> None:
    """Every sandboxed frame or local file has that origin; the log says what would let it in."""
    setting = f"it names no site; to allow all such pages: origins=[{origin!r}]"
    for origins in (None, ["https://example.com", "null" if origin != "null" else "file://"]):
        assert refusal(origins, origin=origin) == f"{origin!r} at '/ws': {setting}"
    assert refusal(["https://example.com", origin], origin=origin) is None
    assert refusal([origin], origin="https://example.com", host="example.org") is not None


@pytest.mark.parametrize(
    ("allowed", "origin", "is_let_in"),
    [
        ("http://localhost:*", "http://localhost", True),
        ("http://localhost:*", "http://localhost:5173", True),
        ("http://localhost:*", "http://LOCALHOST:80", True),
        ("http://localhost:*", "https://localhost:5173", False),
        ("http://localhost:*", "http://localhost.evil.example:5173", False),
        ("http://localhost:*", "http://evil-localhost:5173", False),
        ("http://localhost:*", "http://a.localhost:5173", False),
        ("http://127.0.0.1:*", "http://127.0.0.1:3000", True),
        ("http://[::1]:*", "http://[::1]:3000", True),
        ("https://*.example.com:*", "https://a.b.example.com:8443", True),
        ("https://*.example.com:*", "https://example.com:8443", False),
        ("app://localhost:*", "app://localhost", True),
        ("http://localhost:5173", "http://localhost:3000", False),
    ],
)
def test_an_origin_with_any_port(allowed: str, origin: str, is_let_in: bool) -> None:
    """``:*`` stands for every port of exactly that scheme and host."""
    assert (refusal([allowed], origin=origin) is None) is is_let_in


@pytest.mark.parametrize("wrong", ["http://localhost:*/", "http://*:*", "*:*", "http://:*", ":*"])
def test_an_origin_with_any_port_needs_a_host(wrong: str) -> None:
    """Anything else with a star is refused where it is written."""
    with pytest.raises(PachinkoError, match=r"^origins are like .*localhost:\*. takes every port"):
        Pachinko(origins=[wrong])


def test_two_origin_headers_are_refused() -> None:
    """Also when both are the right one, since something between has misunderstood the request."""
    text = refusal(origin=["http://example.com", "http://example.com"])
    assert text is not None and "it names no site" in text
    assert refusal("*", origin=["http://a.example", "http://b.example"]) is None


def test_no_origin_is_no_browser() -> None:
    """Other clients are let in without the header."""
    assert refusal() is None
    assert refusal(["https://example.com"]) is None


@given(st.text(st.characters(max_codepoint=255)))
def test_any_header_is_read(origin: str) -> None:
    """Whatever is sent is let in or refused with a text of one line, and of bounded length."""
    text = refusal(origin=origin, host="example.com")
    assert text is None or (len(text) < 1000 and text.isprintable())


def test_the_log_line_is_one_short_line() -> None:
    """Neither a header nor a path can forge a second one, or fill the log."""
    text = refusal(origin="http://" + "a" * 5000, path="/ws\n" + "b" * 5000, host="c" * 5000)
    assert text is not None
    assert text.isprintable() and len(text) < 1200


# Listed origins


@pytest.mark.parametrize(
    ("origins", "origin", "is_allowed"),
    [
        (["https://app.example"], "https://app.example", True),
        (["https://app.example"], "https://app.example:443", True),
        (["https://app.example:443"], "HTTPS://APP.example", True),
        (["https://app.example"], "http://app.example", False),
        (["https://app.example"], "https://app.example:8443", False),
        (["https://app.example"], "https://www.app.example", False),
        (["https://app.example"], "https://app.example.evil.example", False),
        (["https://app.example"], "http://example.com", True),  # the own host stays
        (["http://localhost:5173"], "http://localhost:5174", False),
        (["https://*.app.example"], "https://a.app.example", True),
        (["https://*.app.example"], "https://a.b.app.example:443", True),
        (["https://*.app.example"], "https://app.example", False),
        (["https://*.app.example"], "https://evilapp.example", False),
        (["https://*.app.example"], "http://a.app.example", False),
        (["https://*.app.example"], "https://a.app.example:8443", False),
        (["https://*.app.example:8443"], "https://a.app.example:8443", True),
        (["https://*.app.example"], "https://a.app.example.evil.example", False),
        (["chrome-extension://abcdefgh"], "chrome-extension://abcdefgh", True),
        (["chrome-extension://abcdefgh"], "chrome-extension://abcdefgi", False),
        (["*"], "https://evil.example", True),
        ("*", "https://evil.example", True),
        ([], "https://evil.example", False),
        ((name for name in ["https://app.example"]), "https://app.example", True),
    ],
)
def test_listed_origins(origins: Any, origin: str, is_allowed: bool) -> None:
    """They are compared whole; ``*.`` stands for any host below, and ``"*"`` for everybody."""
    text = refusal(origins, origin=origin)
    assert (text is None) is is_allowed
    if text is not None:
        assert text == (
            f"{origin!r} at '/ws' of the host 'example.com'; to allow it: origins=[{origin!r}]"
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"origins": ["https://*"]}, "origins are like"),
        ({"origins": ["https://a*.example.com"]}, "origins are like"),
        ({"origins": ["https://a.*.example.com"]}, "origins are like"),
        ({"origins": ["*.example.com"]}, "origins are like"),
        ({"origins": ["https://bücher.example"]}, "origins are like"),
        ({"origins": ["https://\u212aelvin.example"]}, "origins are like"),
        ({"origins": ["https://example.com:65536"]}, "origins are like"),
        ({"origins": ["https://example.com/"]}, "origins are like"),
        ({"origins": ""}, "origins is a list of str; write origins=['']"),
        ({"trust_forwarded": "yes"}, "trust_forwarded is True or False, got 'yes'"),
    ],
)
def test_a_wrong_option_is_refused(options: Any, says: str) -> None:
    """A developer's mistake shows when the endpoint is made."""
    with pytest.raises(PachinkoError) as caught:
        endpoint(**options)
    assert str(caught.value).startswith(says)


# Behind a proxy

PROXIED = {"host": "127.0.0.1:8000", "origin": "https://chat.example"}


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        ({"x_forwarded_host": "chat.example"}, True),
        ({"x_forwarded_host": "chat.example, inner.example"}, True),
        ({"x_forwarded_host": "evil.example, chat.example"}, False),
        ({"x_forwarded_host": "chat.example", "x_forwarded_proto": "https"}, True),
        ({"x_forwarded_host": "chat.example", "x_forwarded_proto": "https, http"}, True),
        ({"forwarded": "for=192.0.2.1;host=chat.example;proto=https"}, True),
        ({"forwarded": 'host="chat.example:443", host=inner.example'}, True),
        ({"forwarded": "host=other.example", "x_forwarded_host": "chat.example"}, False),
        ({"forwarded": "for=192.0.2.1"}, False),
        ({"forwarded": ";;=,"}, False),
        ({}, False),
    ],
)
def test_forwarded_headers_count_when_they_are_trusted(headers: Any, is_allowed: bool) -> None:
    """Falcon reads them; without the option they change nothing but the hint in the log."""
    assert (refusal(None, True, **PROXIED, **headers) is None) is is_allowed
    text = refusal(None, False, **PROXIED, **headers)
    assert text is not None
    assert ("trust_forwarded=True" in text) is is_allowed


def test_the_log_names_the_host_that_was_compared() -> None:
    """Behind a proxy that is the forwarded one."""
    text = refusal(None, True, **PROXIED, x_forwarded_host="other.example")
    assert text is not None and "of the host 'other.example'" in text


def test_a_plain_page_is_not_let_in_by_an_encrypted_proxy() -> None:
    """The forwarded scheme counts like the request's own."""
    headers = {"x_forwarded_host": "chat.example", "x_forwarded_proto": "https"}
    assert refusal(None, True, origin="http://chat.example", **headers) is not None
    headers["x_forwarded_proto"] = "http"
    assert refusal(None, True, origin="http://chat.example", **headers) is None


async def test_a_refused_origin_is_a_403_and_one_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No handler runs, and the line names the origin and the setting."""
    ws = endpoint()
    called: list[str] = []

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        called.append("authenticate")
        return "ann"

    @ws.connect
    async def arrive(conn: Connection) -> None:
        called.append("connect")

    async with serving(ws._app) as server:
        with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
            async with connect(f"{server.url}/ws", origin="https://evil.example"):
                pass
        assert caught.value.response.status_code == 403
        (record,) = [r for r in caplog.records if r.name == "pachinko"]
        assert record.getMessage() == (
            "refused origin 'https://evil.example' at '/ws' of the host "
            f"'127.0.0.1:{server.port}'; to allow it: origins=['https://evil.example']"
        )
        assert called == []
        async with connect(f"{server.url}/ws", origin=f"http://127.0.0.1:{server.port}"):
            assert called == ["authenticate", "connect"]


# Credentials


@pytest.mark.parametrize(
    ("header", "offered", "token", "rest"),
    [
        (None, [], None, []),
        ("Bearer abc", [], "abc", []),
        ("bearer  abc= ", [], "abc=", []),
        ("Bearer", [], None, []),
        ("Bearer  ", [], None, []),
        ("Basic abc", [], None, []),
        (None, ["bearer", "abc"], "abc", ["bearer"]),
        (None, ["v2", "bearer", "abc", "v1"], "abc", ["v2", "bearer", "v1"]),
        (None, ["v1", "bearer"], None, ["v1", "bearer"]),
        (None, ["Bearer", "abc"], None, ["Bearer", "abc"]),
        ("Bearer abc", ["bearer", "xyz"], "abc", ["bearer"]),
        ("Basic abc", ["bearer", "xyz"], "xyz", ["bearer"]),
    ],
)
def test_credentials(header: Any, offered: Any, token: Any, rest: Any) -> None:
    """The header comes first, then the pair of subprotocols, of which the token is taken out."""
    headers = {"Authorization": header} if header else {}
    req = falcon.asgi.Request(falcon.testing.create_scope_ws(headers=headers), None)  # type: ignore[arg-type]
    assert pachinko.credentials(req, offered) == (token, rest)
