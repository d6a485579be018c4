"""Imports run one way. ORDER is docs/architecture.md's; a new package needs a line in both."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

ORDER = [
    "omni.errors",
    "omni.maths",
    "omni.system",
    "omni.config",
    "omni.video",
    "omni.synthetic",
    "omni.store",
    "preprocess.parallel",
    "preprocess.flow",
    "preprocess.evidence",
    "preprocess.estimate",
    "preprocess.pipeline",
    "omni.field",
    "omni.tracking",
    "omni.evaluation",
    "omni.views",
    "omni.run",
    "omni.cli",
]
"""A package or module may import from those before it in this list."""

CONTRACT = {"errors", "maths", "system", "config", "video", "store"}
"""All of `omni` that `preprocess` may import: the store is the only contract between the two."""

MODEL_MAY_USE = {"omni.maths", "omni.config"}


def sources(folder):
    return sorted(path for path in (REPO / folder).rglob("*.py"))


MODULES = [path for folder in ("omni", "preprocess") for path in sources(folder)]


def name_of(path):
    """Dotted name of a module or package."""
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}
PACKAGES = {name_of(path) for path in MODULES if path.name == "__init__.py"}


def place_of(name):
    """The entry of ORDER that a module belongs to."""
    return ".".join(name.split(".")[:2])


def package_of(path):
    return ".".join(path.relative_to(REPO).parts[:-1])


def imports(path):
    """Modules of ours that a file imports anywhere in it, lazily too, and the other packages."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in NAMES else node.module for name in inside]
        else:
            continue
        for name in found:
            (ours if name.split(".")[0] in ("omni", "preprocess") else others).add(name)
    return ours - {"omni", "preprocess"}, {name.split(".")[0] for name in others}


def known(path):
    """Places that a file imports from, without its own."""
    return {place_of(name) for name in imports(path)[0]} - {place_of(name_of(path))}


def test_everything_has_its_place_in_the_order():
    places = {place_of(name) for name in NAMES if "." in name}
    assert places == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_places_above_its_own(path):
    place = place_of(name_of(path))
    if place in ("omni", "preprocess"):
        return  # their imports are lazy
    allowed = set(ORDER[: ORDER.index(place)])
    assert known(path) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_of_another_package_is_imported_through_that_package(path):
    own = package_of(path)
    for name in imports(path)[0]:
        package = name if name in PACKAGES else name.rpartition(".")[0]
        inside = f"{own}.".startswith(f"{package}.") or package in ("omni", "preprocess")
        parent = package.rpartition(".")[0]
        direct = f"{own}.".startswith(f"{parent}.") or parent in ("omni", "preprocess")
        sub = package in ("preprocess.flow.gmflow", "preprocess.flow.raft")
        assert inside or (name in PACKAGES and (direct or sub)), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("folder", ["scripts", "benchmarks"])
def test_scripts_and_benchmarks_import_packages_not_their_modules(folder):
    for path in sources(folder):
        for name in imports(path)[0] - {"omni.field.model.field"}:  # the ablation replaces a class
            assert name in PACKAGES or name.count(".") == 1, f"{path.name} imports {name}"


def test_a_package_offers_what_its_all_says():
    for name in sorted(PACKAGES - {"preprocess"}):
        package = __import__(name, fromlist=["__all__"])
        assert package.__doc__ and all(hasattr(package, one) for one in package.__all__), name


@pytest.mark.parametrize("path", sources("omni/field/model"), ids=name_of)
def test_the_networks_import_no_path_and_no_store(path):
    assert known(path) <= MODEL_MAY_USE
    standard = {"importlib", "logging", "math", "collections", "dataclasses", "functools", "typing"}
    assert imports(path)[1] <= {"torch", "tinycudann", *standard}


@pytest.mark.parametrize("path", sources("preprocess"), ids=name_of)
def test_preprocess_meets_omni_only_at_the_contract(path):
    assert {p.split(".")[1] for p in known(path) if p.startswith("omni.")} <= CONTRACT


def length_of(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    lines = function.end_lineno - function.lineno + 1
    return lines - (first.end_lineno - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    assert not [function.name for function in functions if length_of(function) > 60]


def test_packages_stay_small():
    for package in PACKAGES:
        assert len(list((REPO / package.replace(".", "/")).glob("*.py"))) <= 12, package
    tracked = [p.name for p in (REPO / "omni").iterdir() if p.name != "__pycache__"]
    assert len(tracked) <= 15


def test_the_tree_of_the_tests_is_that_of_the_code():
    for folder in ("omni", "preprocess"):
        places = {p.parent.relative_to(REPO / "tests") for p in sources(f"tests/{folder}")}
        missing = [place for place in places if not (REPO / place / "__init__.py").is_file()]
        assert not missing


@pytest.mark.parametrize(
    "code",
    [
        "import omni",
        "import omni; omni.OmniError, omni.Config, omni.load_config",
        "from omni.cli import main; main(['--help'])",
        "from omni.cli import main; main(['optimize', '--help'])",
    ],
)
def test_importing_omni_and_asking_for_help_load_no_torch(code):
    script = (
        "import sys\n"
        f"try:\n    {code}\n"
        "except SystemExit as leaving:\n    assert not leaving.code\n"
        "heavy = {'torch', 'cv2', 'scipy', 'tensorboard'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ("usage" in result.stdout) == ("help" in code)


@pytest.mark.slow
def test_flow_is_evaluated_without_what_reads_videos():
    """A GPU machine may have torch, OpenCV and little else, and nothing is installed there."""
    code = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(('av', 'imageio', 'imageio_ffmpeg', 'tyro'))\n"
        "runpy.run_path('benchmarks/flow.py')"
    )
    folders = os.pathsep.join([str(REPO), str(REPO / "benchmarks")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": folders},
    )
    assert result.returncode == 0, result.stderr


def test_every_public_name_exists_in_the_place_it_is_said_to_be():
    import omni
    import preprocess

    for name in omni.__all__:
        assert getattr(omni, name) is not None
    assert callable(preprocess.prepare)
