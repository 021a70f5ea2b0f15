"""Reads the syntax trees of the two modules, for the rules of the house.

Each ``check_…`` function takes the text of a module and returns its findings, a sentence each, with
the line; no finding means that the rule holds. ``test_house.py`` applies them.

The map
-------

The docstring of a module has a line that begins with ``Map``, and below it an indented block with
an entry for each section, in the order of the file::

    Map: what each section does, and which of those above it each one uses.

        errors — the mistakes, by whose fault they are
        codec — turns JSON into what a handler takes, and its answer into JSON
            (uses: errors, envelope and message)

An entry is the section's name, a dash between spaces, and a few words. The sections it uses stand
at its end, as ``(uses: …)`` with commas between them; a section that uses none has no brackets. An
entry may be wrapped: each further line is indented deeper than its first one.

A section begins at its banner, ``# ── codec ──────``, and uses another one if its code refers to a
name that the other one defines at the top level of the module. Annotations are left out: nothing
evaluates them. So are imports and whatever stands under ``if TYPE_CHECKING:``. In
``pachinko_cluster.py`` an entry may name ``pachinko`` among what it uses, if it does.

The glossary
------------

The docstring of ``pachinko.py`` has a line that begins with ``Glossary``, and below it an indented
block of the same form, an entry for each word::

    Glossary

        outbox — the frames that wait until a client's socket takes more

``docs/architecture.md`` explains the same words under the heading ``Glossary``, in the first column
of a table or at the beginning of the items of a list.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

OWNERS = ("Outgoing", "Incoming", "Session", "Connection")

# What several of the owners hold, and the reason for each. Constructors store it, and `release`.
SHARED = {
    "_session": "either half tells it what happens, until the connection is over",
}

# The private names of other packages that a module may use, and the reason for each. They are
# pinned by test_falcon_names.py and test_nats_names.py, with the oldest and the newest release.
FALCON = {
    "_asgi_receive": "the server's receive: a message costs less without Falcon's coroutine",
    "_asgi_send": "the server's send: a delivery costs less without Falcon's coroutine",
    "_buffered_receiver": "has the server's receive, and the queue to switch off",
    "_max_queue": "0 before the accept keeps the queue of this one connection from starting",
    "_pump_task": "tells a connection whose queue runs already from one where it is still to start",
    "_state": "has to say CLOSED after an end that Falcon has not seen, else its close raises",
    "_close_code": "has to be known to Falcon after an end that only the module has read",
}
NATS = {
    "_process_msg": "hands messages on in their order: nats-py has a task a subscription",
    "_process_op_err": "tells at once that the connection has failed",
    "_close": "with uvloop it must not write to a socket that has been closed",
    "_pending": "what it would write then",
    "_pending_data_size": "what it would write then",
    "_connect_command": "has the password in it, and is not to be sent in the clear",
    "_server_info": "says whether the server offers TLS",
    "_transport": "has the writer below",
    "_io_writer": "its socket is aborted where nats-py leaves it open",
    "_pending_queue": "a queue a subscription, which takes 3 KiB and is not used",
}
STANDARD_LIBRARY = {
    "_ready": "what an event loop will run next: nothing, where a simulation is at rest",
    "_scheduled": "the timers of an event loop, some of which an application waits for",
    "_selector": "has the sockets of an event loop",
    "_context": "of a timer: it says which simulation has made it",
    "_callback": "of a timer: it says which task a time-out will cancel",
    "_args": "of a timer: the future that a task sleeps for",
    "_task": "of a time-out: the task that it will cancel",
    "_fut_waiter": "the future that a task waits for",
    "_callbacks": "of a future: the contexts of the tasks that wait for it",
    "_children": "of what `asyncio.gather` returns: the futures that a task waits for",
    "_tasks": "of a `TaskGroup`: the tasks that it waits for",
    "_todo": "of `asyncio.as_completed`: the futures that it waits for",
    "_current_frames": "of `sys`: what threads run, as an application may wait for one",
    "_kwargs": "a process of multiprocessing has its server's configuration there",
}

# Attributes of other objects that a module may store, and the reason for each.
STORED = {
    "__cause__": "an exception that is kept must not keep its stack frames",
    "__context__": "an exception that is kept must not keep its stack frames",
    "__traceback__": "an exception that is kept must not keep its stack frames",
    "type": "of an attrs field: attrs lets a class's transformer resolve it so",
    "user": "of a connection: a property, as an application sets it",
    "expires_at": "of a connection: a property, as an application sets it",
    "_state": "of Falcon's socket, which has not seen the end",
    "_close_code": "of Falcon's socket, which has not seen the end",
    "__setattr__": "of the class of envelopes, which raises what attrs raises",
    "__signature__": "of a function around a handler, which takes less than the handler",
    "_max_queue": "of Falcon's socket, whose queue is switched off",
    "_asgi_receive": "of Falcon's socket, whose queue is switched off",
    "status": "of Falcon's response, as in any resource",
    "data": "of Falcon's response, as in any resource",
}

MODULE_LINES = {"pachinko.py": 10_800, "pachinko_cluster.py": 3600}
SECTION_LINES = 450
FUNCTION_LINES = 45

FOREIGN = ("falcon.", "nats.")

_SELF = ("self", "cls", "super()")
_BANNER = re.compile(r"# ── (.+?) ─+")
_ENTRY = re.compile(r"(?P<name>.+?) — (?P<text>.+?)(?: \(uses: (?P<uses>[^()]+)\))?")
_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp

Found = list[str]


@functools.cache
def parsed(text: str) -> ast.Module:
    """The tree of *text*, which no rule changes, so that all of them share it."""
    return ast.parse(text)


# The docstring's blocks


def block(docstring: str, heading: str) -> list[str]:
    """The entries below the line that begins with *heading*, each as one line."""
    lines = iter(docstring.splitlines())
    entries: list[str] = []
    margin: int | None = None
    if not any(re.match(rf"{heading}\b", line) for line in lines):
        return entries
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            continue
        if indent == 0:
            if margin is None:  # the heading itself goes on
                continue
            break
        margin = indent if margin is None else margin
        if indent > margin:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    return entries


def docstring(text: str) -> str:
    return ast.get_docstring(parsed(text)) or ""


def glossary(text: str) -> list[str]:
    """The words of the glossary in the docstring of a module."""
    return [entry.partition(" — ")[0] for entry in block(docstring(text), "Glossary")]


def glossary_of_page(page: str) -> list[str]:
    """The words of the glossary on a page in Markdown, from a table or a list."""
    _, _, below = page.partition("\n## Glossary\n")
    words: list[str] = []
    rows = re.findall(r"^(?:\| *|[-*] +)(.+?)(?: *\|| — |: |$)", below.split("\n## ")[0], re.M)
    for cell in rows:
        word = cell.strip(" *`_:")
        if word.strip("-: ") and word.lower() not in {"word", "term"}:
            words.append(word)
    return words


# The map


def banners(text: str) -> list[tuple[int, str]]:
    """The line and the name of each section."""
    found = [(n, _BANNER.fullmatch(line)) for n, line in enumerate(text.splitlines(), 1)]
    return [(n, match[1]) for n, match in found if match]


def check_map(text: str) -> Found:
    """Each section is in the map, in order, with exactly the sections that it uses."""
    order = [name for _, name in banners(text)]
    entries, found = [], []
    for entry in block(docstring(text), "Map"):
        if match := _ENTRY.fullmatch(entry):
            uses = [name.strip() for name in (match["uses"] or "").split(",")]
            entries.append((match["name"], [name for name in uses if name]))
        else:
            found.append(f"the map has no 'name — what it does': {entry!r}")
    if not entries:
        return [*found, "the docstring has no map"]
    if len(set(order)) < len(order):
        found.append(f"two sections have one name: {order}")
    if [name for name, _ in entries] != order:
        names = [name for name, _ in entries]
        found.append(f"the map has the sections\n  {names}\nand the file\n  {order}")
    references = used(text)
    for name, uses in entries:
        found += _compare(name, uses, references.get(name, {}), order)
    found += [
        f"line {line}: '{by}' of the section '{other}' is used above the first section"
        for other, (line, by) in references.get("", {}).items()
    ]
    return found


def _compare(
    name: str, uses: list[str], references: Mapping[str, tuple[int, str]], order: list[str]
) -> Found:
    found = [
        f"line {line}: '{name}' uses '{other}' (by '{by}'), and the map does not say so"
        for other, (line, by) in references.items()
        if other not in uses and other != "pachinko"
    ]
    for other in uses:
        if other not in references:
            found.append(f"the map says that '{name}' uses '{other}', and it does not")
        elif other != "pachinko" and order.index(other) >= order.index(name):
            line, by = references[other]
            found.append(f"line {line}: '{name}' uses '{other}' (by '{by}'), which stands below it")
    return found


def used(text: str) -> dict[str, dict[str, tuple[int, str]]]:
    """By section: the sections that it uses, with the line and the name of the first use."""
    tree, starts = parsed(text), banners(text)

    def section(line: int) -> str:
        return next((name for start, name in reversed(starts) if start <= line), "")

    home: dict[str, str] = {}
    for statement in tree.body:
        for name in _bound([statement]):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                module = getattr(statement, "module", None) or name
                home[name] = "pachinko" if module.split(".")[0] == "pachinko" else ""
            else:
                home.setdefault(name, section(statement.lineno))
    result: dict[str, dict[str, tuple[int, str]]] = {}
    for line, name in sorted(_references(tree)):
        here, there = section(line), home.get(name, "")
        if there not in {"", here}:
            result.setdefault(here, {}).setdefault(there, (line, name))
    return result


def _references(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each use of a global name in code that runs."""

    def visit(node: ast.AST, local: frozenset[str]) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load) and node.id not in local:
                yield node.lineno, node.id
            return
        if isinstance(node, ast.If) and _is_for_checkers(node.test):
            node = ast.Module(node.orelse, [])
        if isinstance(node, ast.Lambda | _FUNCTIONS):
            yield from visit_function(node, local)
        elif isinstance(node, ast.ClassDef):
            for part in (*node.decorator_list, *node.bases, *node.keywords):
                yield from visit(part, local)
            bound = frozenset(_bound(node.body))
            for statement in node.body:
                # A method does not see the names of the class body; the body itself does.
                is_function = isinstance(statement, _FUNCTIONS)
                yield from visit(statement, local if is_function else local | bound)
        elif isinstance(node, _COMPREHENSIONS):
            bound = frozenset(_bound([part.target for part in node.generators]))
            yield from visit_all(ast.iter_child_nodes(node), local | bound)
        elif isinstance(node, ast.AnnAssign):
            yield from visit_all([node.target, *([node.value] if node.value else [])], local)
        else:
            yield from visit_all(ast.iter_child_nodes(node), local)

    def visit_all(nodes: Iterable[ast.AST], local: frozenset[str]) -> Iterator[tuple[int, str]]:
        for node in nodes:
            yield from visit(node, local)

    def visit_function(
        node: ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef, local: frozenset[str]
    ) -> Iterator[tuple[int, str]]:
        arguments = node.args
        defaults = [value for value in arguments.kw_defaults if value is not None]
        decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
        yield from visit_all([*decorators, *arguments.defaults, *defaults], local)
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [one for one in (arguments.vararg, arguments.kwarg) if one]
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        inner = local | {one.arg for one in every} | frozenset(_bound(body))
        for inside in body:
            declared = {n for x in ast.walk(inside) if isinstance(x, ast.Global) for n in x.names}
            inner -= declared
        yield from visit_all(list(body), inner)

    yield from visit(tree, frozenset())


def _is_for_checkers(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _bound(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The names that *nodes* bind in their own scope."""
    for node in nodes:
        if isinstance(node, _FUNCTIONS | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Lambda | _COMPREHENSIONS):
            continue
        if isinstance(node, ast.If) and _is_for_checkers(node.test):
            yield from _bound(node.orelse)
            continue
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (one.asname or one.name.split(".")[0] for one in node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        yield from _bound(list(ast.iter_child_nodes(node)))


# Owners


def check_owners(text: str, shared: Collection[str] = (), names: Collection[str] = OWNERS) -> Found:
    """What one of the four owners declares is stored inside the body of its class only.

    Another class may have an attribute of that name, and stores it on ``self``. Another owner may
    not, unless the name is *shared* and stored by constructors and `release` only. A property is no
    attribute in this sense.
    """
    tree = parsed(text)
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = [f"there is no class {name}" for name in names if name not in classes]
    owners = {name: _declared(classes[name]) for name in names if name in classes}
    owner_of: dict[str, str] = {}
    for owner, attributes in owners.items():
        for attribute in attributes:
            if attribute in shared:
                found += _stored_later(classes[owner], attribute)
            elif (first := owner_of.setdefault(attribute, owner)) != owner:
                found.append(f"'{attribute}' is declared by {first} and by {owner}")
    for name in shared:
        if sum(name in attributes for attributes in owners.values()) < 2:
            found.append(f"'{name}' is listed as shared, and no two owners have it")
    for line, receiver, attribute, inside in _stores(tree, items=True):
        owner = owner_of.get(attribute, "")
        if not owner or owner in inside:
            continue
        inner = classes[inside[-1]] if inside else None
        is_owner = inner is not None and bool(
            ({inner.name} | {ast.unparse(base) for base in inner.bases}) & owners.keys()
        )
        if receiver not in {"self", "cls"} or is_owner or inner is None:
            found.append(f"line {line}: {receiver}.{attribute} is stored, which {owner} owns")
    return found


def _stored_later(node: ast.ClassDef, attribute: str) -> Found:
    """Say where a method stores *attribute* that is no constructor and does not let go of it."""
    makers = {"__init__", "__attrs_post_init__", "release"}
    return [
        f"line {line}: '{attribute}' is shared, and {node.name}.{part.name} stores it"
        for part in node.body
        if isinstance(part, _FUNCTIONS) and part.name not in makers
        for line, _, stored, _ in _stores(part, items=True)
        if stored == attribute
    ]


def _declared(node: ast.ClassDef) -> dict[str, int]:
    """The attributes of a class: annotated, in ``__slots__``, or stored on ``self``."""
    declared: dict[str, int] = {}
    properties = {part.name for part in node.body if isinstance(part, _FUNCTIONS)}
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            if "ClassVar" not in ast.unparse(part.annotation):
                declared[part.target.id] = part.lineno
        elif isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "__slots__":
            for value in ast.walk(part.value):
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    declared[value.value] = part.lineno
    for line, receiver, attribute, _ in _stores(node):
        if receiver == "self" and attribute not in properties:
            declared.setdefault(attribute, line)
    return declared


def _stores(tree: ast.AST, items: bool = False) -> Iterator[tuple[int, str, str, list[str]]]:
    """Line, receiver, attribute and enclosing classes of each store and deletion of an attribute.

    With *items* also of each item of what an attribute holds: ``x.streams[id] = …``.
    """

    def visit(node: ast.AST, inside: list[str]) -> Iterator[tuple[int, str, str, list[str]]]:
        if isinstance(node, ast.ClassDef):
            inside = [*inside, node.name]
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield node.lineno, ast.unparse(node.value), node.attr, inside
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            if items and isinstance(node.value, ast.Attribute):
                yield node.lineno, ast.unparse(node.value.value), node.value.attr, inside
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            function = ast.unparse(node.func)
            if function.split(".")[-1].strip("_") in {"setattr", "delattr"}:
                receiver, name = node.args[:2]
                attribute = name.value if isinstance(name, ast.Constant) else ast.unparse(name)
                yield node.lineno, ast.unparse(receiver), str(attribute), inside
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, [])


def check_stores(text: str, *lists: Mapping[str, str]) -> Found:
    """An attribute is stored on ``self``, or by the class that declares it, or it is listed."""
    tree, allowed = parsed(text), {name for one in lists for name in one}
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    declared = {name: _declared(node) for name, node in classes.items()}
    return [
        f"line {line}: {receiver}.{attribute} is stored, of another object"
        for line, receiver, attribute, inside in _stores(tree)
        if receiver not in {"self", "cls"}
        and attribute not in allowed
        and not any(attribute in declared[name] for name in inside)
    ]


def stored(*texts: str) -> set[str]:
    """The attributes that the modules store on other objects."""
    stores = [store for text in texts for store in _stores(parsed(text))]
    return {attribute for _, receiver, attribute, _ in stores if receiver not in {"self", "cls"}}


# Private names


def check_private(text: str, *lists: Mapping[str, str]) -> Found:
    """No private name of another object is used, but for those in *lists*.

    In a class that derives from one of `FOREIGN` the private names of ``self`` are another's, too.
    """
    tree, allowed = parsed(text), {name for one in lists for name in one}
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    elsewhere = {name for _, receiver, name in _private(tree) if receiver not in {*_SELF, *classes}}
    found = [
        f"line {line}: {receiver}.{name} is a private name of another class"
        for line, receiver, name in _private(tree)
        if name not in allowed and f"{receiver}.{name}" not in allowed
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not _is_foreign(node):
            own = {*_declared(node)} | {x.name for x in node.body if isinstance(x, _FUNCTIONS)}
            found += [
                f"line {node.lineno}: {node.name}.{name} has the name of a listed exception"
                for name in sorted(own & allowed & elsewhere)
            ]
    return found


def check_private_list(text: str, *lists: Mapping[str, str]) -> Found:
    """Each listed private name is used."""
    names = set[str]()
    for _, receiver, name in _private(parsed(text)):
        names |= {name, f"{receiver}.{name}"}
    listed = [name for one in lists for name in one]
    return [f"{name} is listed, and not used any more" for name in listed if name not in names]


def _private(node: ast.AST, own: Collection[str] = _SELF) -> Iterator[tuple[int, str, str]]:
    """Line, receiver and name of each private attribute of anything but ``self`` and ``cls``."""
    if isinstance(node, ast.ClassDef):
        own = () if _is_foreign(node) else _SELF
        if not own:
            defined = [part for part in node.body if isinstance(part, _FUNCTIONS)]
            yield from ((d.lineno, node.name, d.name) for d in defined if _is_private(d.name))
    line, receiver, name = 0, "", ""
    if isinstance(node, ast.Attribute):
        line, receiver, name = node.lineno, ast.unparse(node.value), node.attr
    elif isinstance(node, ast.ImportFrom):
        line, receiver = node.lineno, node.module or ""
        parts = [*receiver.split("."), *(one.name for one in node.names)]
        name = next((part for part in parts if _is_private(part)), "")
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in _BY_NAME:
        texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
        line, receiver = node.lineno, ast.unparse(node.args[0]) if node.args else ""
        name = next((text.split(".")[-1] for text in texts if isinstance(text, str)), "")
    if _is_private(name) and receiver not in own:
        yield line, receiver, name
    for child in ast.iter_child_nodes(node):
        yield from _private(child, own)


def _is_foreign(node: ast.ClassDef) -> bool:
    """Whether a class derives from one of another package that has private names of its own."""
    return any(ast.unparse(base).startswith(FOREIGN) for base in node.bases)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


_BY_NAME = {
    "getattr", "setattr", "delattr", "hasattr", "attrgetter", "methodcaller",
    "__getattribute__", "__setattr__", "__delattr__",
}  # fmt: skip


# Budgets


def check_budgets(
    text: str, lines: int, section_lines: int = SECTION_LINES, function_lines: int = FUNCTION_LINES
) -> Found:
    """A module, a section and a function are no longer than they may be."""
    total = len(text.splitlines())
    found = [f"the module has {total} lines, {total - lines} too many"] if total > lines else []
    starts = [*banners(text), (total + 1, "")]
    for (start, name), (end, _) in itertools.pairwise(starts):
        if end - start > section_lines:
            found.append(f"line {start}: the section '{name}' has {end - start} lines")
    for node in ast.walk(parsed(text)):
        if isinstance(node, _FUNCTIONS):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > function_lines:
                found.append(f"line {node.lineno}: the function {node.name} has {length} lines")
    return found


# Words


def check_glossary(text: str, page: str) -> Found:
    """The module and the page explain the same words, about ten of them."""
    here, there = glossary(text), glossary_of_page(page)
    found = [
        f"the glossary has no 'word — meaning': {entry!r}"
        for entry in block(docstring(text), "Glossary")
        if not re.fullmatch(r"\S.*? — \S.*", entry)
    ]
    if not 8 <= len(here) <= 15:
        found.append(f"the glossary of the module has {len(here)} words")
    found += [f"the page does not explain {word!r}" for word in here if word not in there]
    found += [f"the module does not explain {word!r}" for word in there if word not in here]
    return found


BROKER = r"engine(?!er)"
PEER_MESSAGE = r"(?<![A-Za-z])(?<!on_)posts?(?![A-Za-z])|(?<![A-Za-z])Posts?(?![a-z])"
FAN_OUT = r"(?<![A-Za-z])spread\("


def is_other_engine(line: str) -> bool:
    """Whether an engine of another kind is meant."""
    return re.search(r"(database|browser|rendering|template) engine", line) is not None


def check_words(
    text: str, *patterns: str, allowed: Callable[[str], bool] = lambda _: False
) -> Found:
    """None of the words that have been replaced occurs, in a name or in prose."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern in patterns:
            flags = re.IGNORECASE if pattern is BROKER else 0
            if (match := re.search(pattern, line, flags)) and not allowed(line):
                found.append(f"line {number}: {match[0]!r} in {line.strip()!r}")
    return found


# Test files


def check_test_files(text: str, files: Collection[str]) -> Found:
    """Each section has a test file, called after the first word of its name."""
    found = []
    for line, name in banners(text):
        file = f"test_{name.split()[0].lower()}.py"
        if file not in files:
            found.append(f"line {line}: the section '{name}' has no {file}")
    return found
