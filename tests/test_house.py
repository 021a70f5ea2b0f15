"""The rules of the house hold in both modules, and each of them can be broken.

`house` has the rules and says how the map and the glossary are written.
"""

from __future__ import annotations

import re
from pathlib import Path

import house
import pytest

TREE = Path(__file__).parent.parent
PAGES = [*TREE.glob("*.md"), *TREE.glob("docs/*.md"), *TREE.glob("examples/**/*.*")]
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # it may tell old names

needs_the_tree = pytest.mark.skipif(
    not (TREE / "hatch_build.py").exists(), reason="needs the files of the checkout"
)
MODULES = {"pachinko.py": house.FALCON, "pachinko_cluster.py": house.NATS}
each_module = pytest.mark.parametrize("module", MODULES)


def text_of(module: str) -> str:
    return (TREE / module).read_text()


def listed(findings: list[str]) -> str:
    return "\n".join(findings)


# The rules hold


@needs_the_tree
@each_module
def test_the_map_is_that_of_the_code(module: str) -> None:
    """A section uses exactly those that the map names, and all of them stand above it."""
    assert listed(house.check_map(text_of(module))) == ""


@needs_the_tree
def test_each_attribute_of_a_connection_has_one_owner() -> None:
    """What one of the four owners declares is stored nowhere else."""
    assert listed(house.check_owners(text_of("pachinko.py"), house.SHARED)) == ""
    assert all(house.SHARED.values())


@needs_the_tree
@each_module
def test_no_object_is_written_from_outside(module: str) -> None:
    """An attribute of another object is stored only where the list has a reason for it."""
    found = house.check_stores(text_of(module), house.STORED, MODULES[module])
    assert listed(found) == ""


@needs_the_tree
def test_the_list_of_stored_attributes_has_no_more_than_it_needs() -> None:
    """A reason goes when what it is for has gone."""
    assert house.STORED.keys() - house.stored(*map(text_of, MODULES)) == set()
    assert all(house.STORED.values())


@needs_the_tree
@each_module
def test_private_names_are_used_by_their_class(module: str) -> None:
    """No class touches a private name of another, but for the listed ones of other packages."""
    others = MODULES[module]
    found = house.check_private(text_of(module), others, house.STANDARD_LIBRARY)
    assert listed(found + house.check_private_list(text_of(module), others)) == ""
    assert all(others.values())


@needs_the_tree
def test_the_list_of_the_standard_library_has_no_more_than_it_needs() -> None:
    """A reason goes when what it is for has gone."""
    unused = [{*house.check_private_list(text_of(m), house.STANDARD_LIBRARY)} for m in MODULES]
    assert set.intersection(*unused) == set() and all(house.STANDARD_LIBRARY.values())


def test_the_private_names_of_falcon_are_few() -> None:
    """The list may have eight names, and no others than these."""
    assert len(house.FALCON) <= 8
    assert house.FALCON.keys() <= {
        "_asgi_receive", "_asgi_send", "_buffered_receiver", "_close_code", "_max_queue",
        "_pump_task", "_state",
    }  # fmt: skip


@needs_the_tree
@each_module
def test_nothing_is_longer_than_it_may_be(module: str) -> None:
    """A module, its sections and its functions stay in their budgets."""
    assert listed(house.check_budgets(text_of(module), house.MODULE_LINES[module])) == ""


@needs_the_tree
def test_the_glossaries_have_the_same_words() -> None:
    """The module and the page on its architecture explain the same words."""
    page = TREE / "docs" / "architecture.md"
    assert listed(house.check_glossary(text_of("pachinko.py"), page.read_text())) == ""


@needs_the_tree
@each_module
def test_the_modules_use_the_words_of_the_field(module: str) -> None:
    """A broker is no engine, a peer message no post, and nothing is spread."""
    words = (house.BROKER, house.PEER_MESSAGE, house.FAN_OUT)
    assert listed(house.check_words(text_of(module), *words)) == ""


@needs_the_tree
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_call_a_broker_a_broker(page: Path) -> None:
    """The README, the docs and the examples use the words of the modules."""
    if page.suffix in {".md", ".py", ".html", ".js"}:
        found = house.check_words(page.read_text(), house.BROKER, allowed=house.is_other_engine)
        assert listed(found) == ""


@needs_the_tree
def test_each_section_has_a_test_file() -> None:
    """The tests of a section are where its name says."""
    files = [path.name for path in (TREE / "tests").glob("test_*.py")]
    assert listed(house.check_test_files(text_of("pachinko.py"), files)) == ""


# The rules can be broken

MODULE = '''\
"""An example.

Map: what each section does, and which of those above it each one uses.

    errors — the mistakes
    envelope and message — a frame and
        what it has
        (uses: errors)
    hub — reaches clients (uses: envelope and
        message, errors)

The text goes on.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elsewhere import Frame

Id = str | int

# ── errors ──────


class Mistake(Exception):
    late: "Hub"


# ── envelope and message ──────


def frame(text: "Hub", mistake: int = 0) -> "Hub":
    hub = [Hub for Hub in text]
    raise Mistake(hub, Id)


# ── hub ──────


class Hub:
    limit: int = 5

    def send(self, message):
        return frame(message)

    def fail(self, frame=None, kind=Mistake):
        raise kind(frame)
'''


def without(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_a_module_in_order_has_no_findings() -> None:
    """The example that the next tests break is right as it is."""
    assert house.check_map(MODULE) == []
    assert house.check_private(MODULE) == house.check_stores(MODULE) == []
    assert house.check_budgets(MODULE, 60) == []


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("    errors — the mistakes\n", "", "the map has the sections"),
        ("    errors — the mistakes\n", "    errors: the mistakes\n", "has no 'name — what"),
        ("# ── hub ──────\n", "", "the map has the sections"),
        ("# ── hub ──────\n", "# ── hub ──────\n# ── hub ──────\n", "two sections have one name"),
        ("Map: what", "What", "the docstring has no map"),
        (
            "        (uses: errors)\n",
            "",
            "'envelope and message' uses 'errors' (by 'Mistake'), and the map does not say so",
        ),
        (
            "the mistakes\n",
            "the mistakes (uses: hub)\n",
            "the map says that 'errors' uses 'hub', and it does not",
        ),
        (
            "message, errors)\n",
            "message, errors, nonsense)\n",
            "the map says that 'hub' uses 'nonsense', and it does not",
        ),
        ("raise Mistake(hub, Id)", "return Hub()", "'envelope and message' uses 'hub'"),
        ("Id = str | int", "Id = Hub", "'Hub' of the section 'hub' is used above"),
    ],
)
def test_a_map_that_is_wrong_is_found(old: str, new: str, finding: str) -> None:
    """A section that is missing, and a use too few or too many."""
    found = house.check_map(without(MODULE, (old, new)))
    assert any(finding in one for one in found), found


def test_a_section_that_uses_one_below_it_is_found() -> None:
    """The map may say so as well; the order is wrong all the same."""
    broken = without(
        MODULE,
        ("the mistakes\n", "the mistakes (uses: hub)\n"),
        ('late: "Hub"', "late = lambda: Hub()"),
    )
    (found,) = house.check_map(broken)
    assert re.fullmatch(r"line \d+: 'errors' uses 'hub' \(by 'Hub'\), which stands below it", found)


@pytest.mark.parametrize(
    ("code", "uses"),
    [
        ("def f(): return shown", True),
        ("def f(x=shown): ...", True),
        ("@shown\ndef f(): ...", True),
        ("f = lambda: shown", True),
        ("class F(shown): ...", True),
        ("class F(metaclass=shown): ...", True),
        ("class F:\n    def shown(self): return shown", True),
        ("class F:\n    x = shown", True),
        ("f: int = shown", True),
        ("f = [x for x in shown]", True),
        ("def f():\n    global shown\n    shown = shown + 1", True),
        ("try: ...\nexcept shown: ...", True),
        ("def f(x: shown) -> shown: ...", False),
        ("def f(shown): return shown", False),
        ("def f(*shown): return shown", False),
        ("def f():\n    shown = 1\n    def g(): return shown", False),
        ("def f():\n    for shown in (): print(shown)", False),
        ("def f():\n    import shown\n    shown.go()", False),
        ("def f():\n    try: ...\n    except OSError as shown: print(shown)", False),
        ("def f(x):\n    match x:\n        case [shown]: return shown", False),
        ("f = lambda shown: shown", False),
        ("f = [shown for shown in ()]", False),
        ("f: shown = 1", False),
        ("class F:\n    shown = 1\n    x = shown", False),
        ("if typing.TYPE_CHECKING:\n    f = shown", False),
        ("f = 'shown'", False),
    ],
)
def test_what_counts_as_a_use(code: str, uses: bool) -> None:
    """A name that is global where it stands, in code that runs."""
    text = f"# ── one ───\nshown = 1\n# ── two ───\n{code}\n"
    assert ("one" in house.used(text).get("two", {})) is uses


def test_the_module_counts_as_a_section_of_its_companion() -> None:
    """The companion's map may name it, if that is true."""
    text = '"""X.\n\nMap\n\n    wire — text (uses: pachinko)\n"""\n'
    text += "from pachinko import Hub\n# ── wire ───\nhub = Hub()\n"
    assert house.check_map(text) == []
    assert house.check_map(text.replace(" (uses: pachinko)", "")) == []
    (found,) = house.check_map(text.replace("hub = Hub()", ""))
    assert found == "the map says that 'wire' uses 'pachinko', and it does not"


OWNING = """
class Outgoing:
    __slots__ = ("phase", "outbox")

class Incoming:
    ahead: list
    listening: bool = True
    kinds: ClassVar[int] = 1

    def watch(self):
        self.ahead, self.frames = [], 0
        self.listening = False

class Session:
    streams: dict

    def stop(self):
        del self.streams[1]

class Connection:
    user: str

    @property
    def phase(self):
        return self._outgoing.phase

class Other:
    def __init__(self, user):
        self.user = user
"""


def test_owners_in_order_have_no_findings() -> None:
    """A property may have the name of another owner's attribute, and another class its own."""
    assert house.check_owners(OWNING) == []


@pytest.mark.parametrize(
    ("code", "finding"),
    [
        ("def f(x): x.phase = 1", "x.phase is stored, which Outgoing owns"),
        ("def f(x): x.conn.ahead += 1", "x.conn.ahead is stored, which Incoming owns"),
        ("def f(x): x.user: str = 1", "x.user is stored, which Connection owns"),
        ("def f(x): x.y, (x.frames, z) = 1, 2", "x.frames is stored, which Incoming owns"),
        ("def f(x): del x.outbox", "x.outbox is stored, which Outgoing owns"),
        ("def f(x):\n    with x as x.user: pass", "x.user is stored, which Connection owns"),
        ("def f(x):\n    for x.user in (): pass", "x.user is stored, which Connection owns"),
        ("def f(x): setattr(x, 'user', 1)", "x.user is stored, which Connection owns"),
        ("def f(x): object.__setattr__(x, 'user', 1)", "x.user is stored, which Connection owns"),
        ("def f(x): delattr(x, 'user')", "x.user is stored, which Connection owns"),
        ("def f(x): x.streams[2] = 1", "x.streams is stored, which Session owns"),
        ("def f(self): self.user = 1", "self.user is stored, which Connection owns"),
        ("class F(Session):\n    def f(self): self.streams = 1", "self.streams is stored"),
        ("class F:\n    def f(self, x): x.streams = 1", "x.streams is stored, which Session owns"),
    ],
)
def test_a_store_by_another_class_is_found(code: str, finding: str) -> None:
    """No matter how, and on which object."""
    found = house.check_owners(f"{OWNING}\n{code}\n")
    assert len(found) == 1 and finding in found[0], found


def test_two_owners_of_one_attribute_are_found() -> None:
    """Also where one of them does not declare it, but stores it on itself."""
    twice = OWNING.replace("user: str", "user: str\n    listening: bool")
    assert "'listening' is declared by Incoming and by Connection" in house.check_owners(twice)
    twice = OWNING.replace("del self.streams[1]", "self.ahead = 1")
    assert "'ahead' is declared by Incoming and by Session" in house.check_owners(twice)


def test_what_owners_share_is_stored_by_constructors_only() -> None:
    """A listed name may be in several owners as long as nobody stores it later."""
    twice = OWNING.replace("user: str", "user: str\n    streams: dict")
    twice = twice.replace("del self.streams[1]", "self.tasks = 1")
    assert house.check_owners(twice) == ["'streams' is declared by Session and by Connection"]
    assert house.check_owners(twice, {"streams": "a reason"}) == []
    later = twice.replace("self.tasks = 1", "self.streams = 1")
    (found,) = house.check_owners(later, {"streams": "a reason"})
    assert "'streams' is shared, and Session.stop stores it" in found
    (found,) = house.check_owners(OWNING, {"outbox": "a reason"})
    assert found == "'outbox' is listed as shared, and no two owners have it"


def test_an_owner_that_is_missing_is_found() -> None:
    """The rule does not vanish with a class that is renamed."""
    renamed = OWNING.replace("class Session", "class Dispatcher")
    assert house.check_owners(renamed) == ["there is no class Session"]


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("def f(x): x.y = 1", True),
        ("def f(x): del x.y", True),
        ("def f(x): setattr(x, name, 1)", True),
        ("class F:\n    def f(self): self.x.y = 1", True),
        ("class F:\n    y: int\n    def f(self): self.y = 1", False),
        ("class F:\n    y: int\n    def copy(self, x): x.y = self.y", False),
        ("def f(x): x.listed = 1", False),
    ],
)
def test_an_attribute_stored_from_outside_is_found(code: str, is_found: bool) -> None:
    """An object may be written by its own class, and as the list says."""
    assert bool(house.check_stores(code, {"listed": "a reason"})) is is_found
    assert house.stored("def f(x): x.listed = 1") == {"listed"}


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("x._name", True),
        ("x._name = 1", True),
        ("x.y._name()", True),
        ("self.x._name", True),
        ("getattr(x, '_name')", True),
        ("getattr(x, '_name', None)", True),
        ("object.__setattr__(x, '_name', 1)", True),
        ("operator.attrgetter('y._name')", True),
        ("x.__name", True),
        ("from falcon.asgi.ws import _WebSocketState", True),
        ("from cattrs._compat import is_union", True),
        ("from __future__ import annotations", False),
        ("self._name", False),
        ("cls._name", False),
        ("super()._name()", False),
        ("getattr(self, '_name')", False),
        ("x.__dict__", False),
        ("x.name_", False),
        ("x._listed", False),
        ("sys._module_function()", False),
        ("os._module_function()", True),
        ("class F(nats.Client):\n    def f(self): self._name", True),
        ("class F(nats.Client):\n    def f(self): super()._name()", True),
        ("class F(nats.Client):\n    def _name(self): ...", True),
        ("class F(nats.Client):\n    def _listed(self): self._listed", False),
        ("class F(Exception):\n    def _name(self): self._name", False),
    ],
)
def test_a_private_name_of_another_class_is_found(code: str, is_found: bool) -> None:
    """By a dot or as a text, but for ``self``, ``cls``, and the list."""
    lists = {"_listed": "a reason"}, {"sys._module_function": "a reason"}
    assert bool(house.check_private(code, *lists)) is is_found


def test_a_list_of_private_names_that_has_too_many_is_found() -> None:
    """An exception that nothing needs any more is no exception."""
    lists = {"_state": "a reason"}, {"sys._getframe": "a reason"}
    assert house.check_private_list("x._state, sys._getframe(1)", *lists) == []
    found = house.check_private_list("self._state, os._getframe(1)", *lists)
    assert [one.split()[0] for one in found] == ["_state", "sys._getframe"]


@pytest.mark.parametrize("code", ["_state: int", "__slots__ = ('_state',)", "def _state(s): ..."])
def test_an_own_name_like_a_listed_one_is_found(code: str) -> None:
    """The list would hide the accesses to a private name of a class of the module."""
    own, lists = f"class F:\n    {code}\n", {"_state": "a reason"}
    (found,) = house.check_private(f"{own}f._state", lists)
    assert "F._state has the name of a listed exception" in found
    assert house.check_private(own, lists) == []
    foreign = "class G(nats.Client):\n    def _state(self): super()._state()\n"
    assert house.check_private(own + foreign, lists) == []


def test_what_is_too_long_is_found() -> None:
    """By one line."""
    section = "# ── long ───\n" + "x = 1\n" * 9
    function = "@decorated\nasync def f():\n" + "    x = 1\n" * 4
    text = section + "# ── short ───\n" + function
    assert house.check_budgets(text, 17, 10, 5) == []
    assert house.check_budgets(text, 16, 10, 5) == ["the module has 17 lines, 1 too many"]
    assert house.check_budgets(text, 17, 9, 5) == ["line 1: the section 'long' has 10 lines"]
    assert house.check_budgets(text, 17, 10, 4) == ["line 13: the function f has 5 lines"]
    assert len(house.check_budgets(section, 99, 9)) == 1  # also the last one


def test_glossaries_that_differ_are_found() -> None:
    """By a word, by its form, or by their length."""
    words = ["broker", "peer message", *(f"word{n}" for n in range(8))]
    entries = "".join(f"    {word} — what it\n      means.\n" for word in words)
    text = f'"""A module.\n\nGlossary\n\n{entries}\nMap\n\n    errors — text\n"""\n'
    table = "# T\n\n## Glossary\n\n| Word | Meaning |\n|---|---|\n"
    table += "".join(f"| **{word}** | something |\n" for word in words) + "\n## Next\n\n- more\n"
    items = "## Glossary\n\n" + "".join(f"- *{word}* — something\n" for word in words)
    assert house.glossary(text) == words
    assert house.check_glossary(text, table) == []
    assert house.check_glossary(text, "\n" + items) == []
    assert house.check_glossary(text, table.replace("word3", "word9")) == [
        "the page does not explain 'word3'",
        "the module does not explain 'word9'",
    ]
    found = house.check_glossary(text.replace("broker —", "broker:"), table)
    assert found[0] == "the glossary has no 'word — meaning': 'broker: what it means.'"
    assert "the glossary of the module has 0 words" in house.check_glossary('"""X."""', table)


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("# the engine is away", True),
        ("class EngineAway:", True),
        ("engine_down = ENGINES", True),
        ("class Post:", True),
        ("def take(post):", True),
        ("# a post, some posts", True),
        ("self._posts = 0", True),
        ("await conn._post(event)", True),
        ("await spread(receivers)", True),
        ("an engineer", False),
        ("postpone, outpost, POST, on_post", False),
        ("widespread (and so on)", False),
        ("# the database engine", False),
    ],
)
def test_a_word_that_has_been_replaced_is_found(line: str, is_found: bool) -> None:
    """In names and in prose, but not as a part of other words."""
    words = (house.BROKER, house.PEER_MESSAGE, house.FAN_OUT)
    found = house.check_words(line, *words, allowed=house.is_other_engine)
    assert bool(found) is is_found


def test_a_section_without_tests_is_found() -> None:
    """The first word of its name is that of the file."""
    text = "# ── envelope and message ───\n# ── Pachinko ───\n"
    assert house.check_test_files(text, ["test_envelope.py", "test_pachinko.py"]) == []
    (found,) = house.check_test_files(text, ["test_envelope.py"])
    assert found == "line 2: the section 'Pachinko' has no test_pachinko.py"
