"""Imports run one way. The table is docs/architecture.md's; a new module needs a line in it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

LEVELS = [
    "errors config coords schedules splines textures surfaces scenes",  # nothing but numbers
    "memory threads signals files lock decoding images video store tracks links camera appearance"
    " landmarks integration smoothing",  # files
    "networks bijection canonical rendering",  # tensors
    "model",
    "losses sampling initialize",
    "checkpoint trainer",
    "baselines confidence fusion witnesses consensus readout dense report truth metrics overlay viz"
    " board summaries synthetic",  # results
    "run doctor cli",
]
ORDER = " ".join(LEVELS).split()
TENSORS = LEVELS[2].split()
CONTRACT = {"config", "coords", "errors", "memory", "store", "threads", "video"}
"""All that `preprocess` may know of `omni`: the store is the only road between the two."""


def modules(package):
    return sorted(p.stem for p in (REPO / package).glob("*.py") if p.stem != "__init__")


def imports(package, name):
    """(package, module, lazy) of every import of ours, and the names of all other packages."""
    tree = ast.parse((REPO / package / f"{name}.py").read_text(encoding="utf-8"))
    top, ours, others = set(tree.body), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}/{name}.py: imports are absolute"
            targets = [node.module]
            if node.module in ("omni", "preprocess"):
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            head, _, rest = target.partition(".")
            if head in ("omni", "preprocess"):
                ours.add((head, rest.split(".")[0], node not in top))
            else:
                others.add(head)
    return ours, others


def omni_imports(name):
    return {module for package, module, _ in imports("omni", name)[0] if package == "omni"}


def reachable(name):
    seen, pending = set(), [name]
    while pending:
        for module in omni_imports(pending.pop()) - seen:
            seen.add(module)
            pending.append(module)
    return seen


def test_every_module_has_a_level():
    missing = set(modules("omni")) - set(ORDER)
    assert not missing, f"give {sorted(missing)} a place in LEVELS and in docs/architecture.md"


@pytest.mark.parametrize("name", modules("omni"))
def test_a_module_imports_only_lower_levels_and_its_left_neighbours(name):
    allowed = set(ORDER[: ORDER.index(name)])
    wrong = omni_imports(name) - allowed
    assert not wrong, f"omni/{name}.py imports {sorted(wrong)}"


@pytest.mark.parametrize("name", TENSORS)
def test_the_networks_know_no_path_config_or_store(name):
    assert omni_imports(name) <= {"splines", *TENSORS}
    standard = {"importlib", "logging", "math", "collections", "dataclasses", "typing"}
    assert imports("omni", name)[1] <= {"torch", "tinycudann", *standard}


def test_reading_tracks_needs_nothing_of_the_training():
    assert not reachable("readout") & {"trainer", "sampling", "losses", "initialize", "checkpoint"}


@pytest.mark.parametrize("name", modules("preprocess"))
def test_preprocess_meets_omni_only_at_the_contract(name):
    ours, _ = imports("preprocess", name)
    assert {module for package, module, _ in ours if package == "omni"} <= CONTRACT


def test_omni_reaches_preprocess_only_from_run_and_lazily():
    found = {
        (name, lazy)
        for name in [*modules("omni"), "__init__"]
        for package, _, lazy in imports("omni", name)[0]
        if package == "preprocess"
    }
    assert found == {("run", True)}


def test_training_of_the_flow_network_is_a_room_of_its_own():
    """It knows the network and numbers; nothing that is used without training knows it."""
    known = {
        target[:2]
        for name in modules("preprocess/training")
        for target in imports("preprocess/training", name)[0]
        if target[:2] != ("preprocess", "training")
    }
    assert known == {("preprocess", "network")} | {
        ("omni", name)
        for name in ("checkpoint", "coords", "errors", "signals", "store", "textures")
    }
    for package in ("omni", "preprocess"):
        for name in modules(package):
            used = {target[:2] for target in imports(package, name)[0]}
            assert ("preprocess", "training") not in used, name


def test_nothing_imports_the_command_line():
    everyone = [("omni", n) for n in modules("omni")] + [
        ("preprocess", n) for n in modules("preprocess")
    ]
    users = [who for who in everyone if ("omni", "cli") in {i[:2] for i in imports(*who)[0]}]
    assert users == []


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
def test_the_flow_network_is_trained_and_judged_without_what_reads_videos():
    """A GPU machine may have torch, OpenCV and little else, and nothing is installed there."""
    code = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(('av', 'imageio', 'imageio_ffmpeg', 'tyro'))\n"
        "for script in ('scripts/train_raft.py', 'benchmarks/flow.py'):\n"
        "    runpy.run_path(script)"
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
