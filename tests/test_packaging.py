"""What the sdist, the wheel and an editable install hold."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

TREE = Path(__file__).parent.parent
MODULES = ("pachinko", "pachinko_cluster")
ASSETS = ("pachinko.d.ts", "pachinko.js")

pytestmark = pytest.mark.skipif(
    not (TREE / "hatch_build.py").exists(), reason="needs the files of the checkout"
)


def run(*command: str, cwd: Path | None = None) -> str:
    """Run *command* and return what it printed."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def build(target: str, tree: Path, directory: Path) -> Path:
    """Build ``sdist`` or ``wheel`` from *tree* and return the file, alone in *directory*."""
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(directory), cwd=tree)
    (built,) = directory.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of this tree."""
    return zipfile.ZipFile(build("wheel", TREE, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    """The core metadata of the wheel."""
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    return HeaderParser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of this tree."""
    built = build("sdist", TREE, tmp_path_factory.mktemp("sdist"))
    directory = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built) as archive:
        archive.extractall(directory, filter="data")
    (tree,) = directory.iterdir()
    return tree


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    """The wheel has each module as a package with the marker of PEP 561, assets, and metadata."""
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert sorted(wheel.namelist()) == sorted(
        [
            "pachinko/__init__.py",
            *(f"pachinko/client/{name}" for name in ASSETS),
            "pachinko/py.typed",
            "pachinko_cluster/__init__.py",
            "pachinko_cluster/py.typed",
            f"{info}/METADATA",
            f"{info}/RECORD",
            f"{info}/WHEEL",
            f"{info}/entry_points.txt",
            f"{info}/licenses/LICENSE",
        ]
    )


@pytest.mark.parametrize("module", MODULES)
def test_the_wheel_has_the_bytes_of_the_module(wheel, module):
    """The installed package is the file of the checkout, byte for byte."""
    assert wheel.read(f"{module}/__init__.py") == (TREE / f"{module}.py").read_bytes()


@pytest.mark.parametrize("name", ASSETS)
def test_the_wheel_has_the_bytes_of_an_asset(wheel, name):
    """A file of ``client/`` is in the package, beside the module that serves it."""
    assert wheel.read(f"pachinko/client/{name}") == (TREE / "client" / name).read_bytes()


@pytest.mark.parametrize("module", MODULES)
def test_the_wheel_marks_the_package_as_typed(wheel, module):
    """The marker is an empty file: with text in it, PEP 561 would call the stubs partial."""
    assert wheel.read(f"{module}/py.typed") == b""


def test_the_wheel_installs_the_command(wheel):
    """The shell command is a function that the companion defines."""
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert dict(parser["console_scripts"]) == {"pachinko": "pachinko_cluster:main"}
    companion = ast.parse(wheel.read("pachinko_cluster/__init__.py"))
    assert "main" in {node.name for node in companion.body if isinstance(node, ast.FunctionDef)}


def test_the_wheel_is_for_every_python_and_system(wheel):
    """The wheel is pure Python."""
    (name,) = (name for name in wheel.namelist() if name.endswith("/WHEEL"))
    assert HeaderParser().parsestr(wheel.read(name).decode())["Tag"] == "py3-none-any"


def test_builds_are_reproducible(wheel, tmp_path):
    """The same tree gives the same wheel."""
    again = build("wheel", TREE, tmp_path)
    assert Path(wheel.filename).read_bytes() == again.read_bytes()


def test_the_metadata_names_the_distribution(metadata):
    """Name, version, licence and supported Pythons are what the project says."""
    namespace = {"__name__": "version"}
    lines = (TREE / "pachinko.py").read_text().splitlines()
    exec(next(line for line in lines if line.startswith("__version__ = ")), namespace)
    assert metadata["Name"] == "falcon-pachinko"
    assert metadata["Version"] == namespace["__version__"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_the_metadata_offers_the_extras(metadata):
    """The optional parts can be asked for by name."""
    assert set(metadata.get_all("Provides-Extra", [])) == {"nats", "redis", "server", "test"}


def test_a_plain_install_brings_only_what_the_module_imports(metadata):
    """Engines, servers and test tools come with extras only."""
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">")[0] for line in required} == {
        "attrs",
        "cattrs[msgspec]",
        "falcon",
        "msgspec",
    }


def test_the_oldest_packages_are_tested(metadata):
    """The lower bounds of the metadata are what tox installs for one of its environments."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(TREE / "tox.ini")
    pinned = dict(line.split("==") for line in tox["testenv:oldest"]["deps"].split())
    lines = [line for line in metadata.get_all("Requires-Dist", []) if "'test'" not in line]
    bounds = dict(re.match(r"([\w-]+).*?>=([\d.]+)", line).groups() for line in lines)
    for name, bound in bounds.items():
        bounds[name] = bound + ".0" * (2 - bound.count("."))  # 4.0 is 4.0.0
    assert pinned == bounds
    assert "oldest" in tox["tox"]["env_list"].split()


def test_the_sdist_has_what_building_and_testing_needs(sdist):
    """Everything that a contributor or a distributor runs is in the sdist."""
    needed = ["LICENSE", "README.md", "hatch_build.py", "pyproject.toml", "tox.ini"]
    needed += [f"{module}.py" for module in MODULES] + [f"client/{name}" for name in ASSETS]
    assert [name for name in needed if not (sdist / name).is_file()] == []
    here = {path.relative_to(TREE) for path in (TREE / "tests").rglob("*.py")}
    assert {path.relative_to(sdist) for path in (sdist / "tests").rglob("*.py")} == here


def test_the_sdist_has_nothing_that_is_not_the_projects(sdist):
    """Caches, environments and other strays in the checkout stay there."""
    known = {path.name for path in TREE.iterdir()} | {"PKG-INFO"}
    found = {path.name for path in sdist.iterdir()}
    assert found <= known
    assert not found & {".git", ".tox", ".venv", "build", "dist", "venv"}
    assert [path for path in sdist.rglob("*") if path.name == "__pycache__"] == []


def test_the_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    """A wheel built from the sdist is the one built from the checkout."""
    with zipfile.ZipFile(build("wheel", sdist, tmp_path)) as rebuilt:
        assert {n: rebuilt.read(n) for n in rebuilt.namelist()} == {
            n: wheel.read(n) for n in wheel.namelist()
        }


def test_an_editable_install_imports_the_live_files(sdist, tmp_path):
    """What is edited after an editable install is what Python imports."""
    tree = shutil.copytree(sdist, tmp_path / "tree")
    environment = tmp_path / "environment"
    # The dependencies and hatchling are those of the environment that runs the tests.
    outer = [path for path in sys.path if path.endswith("site-packages")]
    run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = str(next(environment.glob("[bS][ic][nr]*/python*")))
    (site,) = environment.glob("[lL]ib/**/site-packages")
    (site / "zz_outer.pth").write_text("\n".join(outer))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    run(*pip, "--ignore-installed", "--no-build-isolation", "--editable", str(tree))
    for module in MODULES:
        file = tree / f"{module}.py"
        with file.open("a") as source:
            source.write("\nedited = True\n")
        show = f"import {module}; print({module}.edited, {module}.__file__)"
        assert run(python, "-c", show, cwd=tmp_path).split() == ["True", str(file)]
