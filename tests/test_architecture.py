"""The laws of the house, read from the source: who imports whom, and how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "linvideo_core"
CORE_FILES = sorted(CORE.rglob("*.py"))
NODE_FILES = sorted((ROOT / "nodes").rglob("*.py"))

# A room that is missing here may import any library; itself is always allowed.
ALLOWED = {
    "adapters": {"attention"},
    "attention": {"kernels", "config"},
    "checkpoint_files": {"checkpoints", "storage", "team"},
    "checkpoints": {"parallel", "storage", "team"},
    "config": set(),
    "dmd2": {"flow"},
    "few_step": {"flow", "team"},
    "fidelity": {"evaluation", "motion", "spectrum"},
    "flow": set(),
    "kernels": set(),
    "layer_order": {"run_folder", "sensitivity", "storage"},
    "layer_scores": set(),
    "lora": set(),
    "lora_file": {"artifact", "models"},
    "memory": set(),
    "models": {"attention", "config", "flow", "kernels"},
    "health": set(),
    "held": {"models", "training"},
    "motion": set(),
    "offload": set(),
    "level_density": set(),
    "objectives": {"flow", "config", "dmd2", "level_density", "team"},
    "parallel": {"team", "units"},
    "progress": set(),
    "prompts": {"config", "memory", "models", "progress", "storage"},
    "recipe": {"few_step", "flow"},
    "replay": set(),
    "run_folder": {"config", "storage"},
    "selection": {"attention", "config", "layer_scores"},
    "scale": {
        "adapters",
        "attention",
        "flow",
        "kernels",
        "memory",
        "models",
        "progress",
        "records",
        "selection",
        "storage",
        "subject",
        "trajectories",
    },
    "sensitivity": {
        "attention",
        "config",
        "evaluation",
        "models",
        "progress",
        "storage",
        "subject",
        "team",
        "trajectories",
    },
    "spectrum": set(),
    "stages": {"artifact", "demo"},
    "storage": set(),
    "task": set(),
    "team": set(),
    "teacher_features": {"adapters", "attention", "flow", "models"},
    "training": {
        "checkpoint_files",
        "checkpoints",
        "config",
        "progress",
        "run_folder",
        "task",
        "team",
    },
    "units": set(),
}
MAX_LINES = 320
MAX_KERNEL_LINES = 500


def module_of(path: Path) -> str:
    """Return a file's dotted name from the repository's root, such as "linvideo_core.flow"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in [*CORE_FILES, *NODE_FILES]}


def resolve(path: Path, node: ast.ImportFrom) -> Iterator[str]:
    """Yield the absolute modules that a `from ... import` in a file names."""
    if node.level == 0:
        base = node.module
    else:
        package = module_of(path).split(".")
        if path.name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, *(node.module.split(".") if node.module else [])])
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        yield submodule if submodule in MODULES or node.level == 0 else base


def imports_of(path: Path) -> Iterator[str]:
    """Yield every absolute module that a file imports anywhere, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from resolve(path, node)


def room_of(module: str) -> str | None:
    """Return the room of a core module: the file or folder directly under linvideo_core."""
    top, *rest = module.split(".")
    return rest[0] if top == "linvideo_core" and rest else None


def is_command(path: Path) -> bool:
    """Say whether a file is run with `python -m`."""
    return 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")


def importers(prefix: str, files: list[Path]) -> set[str]:
    """Return the files that import a module or what lies below it."""
    return {
        str(path.relative_to(ROOT))
        for path in files
        for name in imports_of(path)
        if name == prefix or name.startswith(f"{prefix}.")
    }


COMMANDS = {name for name, path in MODULES.items() if is_command(path)}
LIBRARY_FILES = [path for path in CORE_FILES if module_of(path) not in COMMANDS]


def test_the_verbs_are_recognised_as_commands() -> None:
    names = {"transfer", "distill", "ablate", "evaluate", "benchmark", "records", "demo.train"}
    assert {f"linvideo_core.{name}" for name in names} <= COMMANDS


@pytest.mark.parametrize("host", ["comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes"])
def test_core_never_imports_the_host_or_the_nodes(host: str) -> None:
    assert importers(host, CORE_FILES) == set()


def test_core_is_imported_only_relatively() -> None:
    absolute = set()
    for path in [*CORE_FILES, *NODE_FILES]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            if any(name.split(".")[0] == "linvideo_core" for name in names):
                absolute.add(str(path.relative_to(ROOT)))
    assert absolute == set()


def test_nodes_never_import_the_module_called_nodes() -> None:
    for path in NODE_FILES:
        assert "nodes" not in set(imports_of(path)), path


def test_no_library_imports_a_command() -> None:
    found = {
        (module_of(path), name)
        for path in LIBRARY_FILES
        for name in imports_of(path)
        if name in COMMANDS
    }
    assert found == set()


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    files = [path for path in LIBRARY_FILES if room_of(module_of(path)) == room]
    assert files, f"{room} is no room any more"
    found = {room_of(name) for path in files for name in imports_of(path)} - {None, room}
    assert found <= ALLOWED[room]


def test_triton_is_known_to_the_kernels_alone() -> None:
    found = importers("triton", [*CORE_FILES, *NODE_FILES])
    assert all(name.startswith("linvideo_core/kernels/") for name in found)


def test_the_kernels_are_entered_by_their_door_but_for_what_measures_them() -> None:
    def enter(*rooms: str) -> set[str]:
        return {
            name
            for path in CORE_FILES
            if room_of(module_of(path)) in rooms
            for name in imports_of(path)
            if room_of(name) == "kernels"
        }

    measuring = {"scale", "benchmark"}
    others = {room_of(module_of(path)) for path in CORE_FILES} - {"kernels", None} - measuring
    assert enter(*others) == {"linvideo_core.kernels"}
    instruments = {"agreement", "contenders", "cost", "instruments", "speed"}
    assert enter(*measuring) <= {f"linvideo_core.kernels.{name}" for name in instruments}


def test_arguments_are_parsed_in_one_file() -> None:
    assert importers("argparse", [*CORE_FILES, *NODE_FILES]) == {"linvideo_core/config.py"}


def test_torch_distributed_is_known_to_one_file() -> None:
    found = importers("torch.distributed", [*CORE_FILES, *NODE_FILES])
    for path in [*CORE_FILES, *NODE_FILES]:
        if "torch.distributed" in path.read_text(encoding="utf-8"):
            found.add(str(path.relative_to(ROOT)))
    assert found == {"linvideo_core/parallel.py"}


def test_the_text_encoders_packages_are_known_to_one_file() -> None:
    for package in ("transformers", "tokenizers", "sentencepiece", "ftfy"):
        found = importers(package, [*CORE_FILES, *NODE_FILES])
        assert found == {"linvideo_core/prompts/text_encoder.py"}


def test_plots_are_drawn_in_one_room() -> None:
    assert importers("matplotlib", [*CORE_FILES, *NODE_FILES]) <= {"linvideo_core/report.py"}


def test_libraries_that_draw_nothing_load_neither_matplotlib_nor_sklearn() -> None:
    report = "linvideo_core.report"
    drawing = {report} | {m for m, p in MODULES.items() if report in set(imports_of(p))}
    names = [module_of(path) for path in LIBRARY_FILES if module_of(path) not in drawing]
    program = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print(sorted({'matplotlib', 'sklearn', 'transformers', 'ftfy'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"


def test_the_pack_imports_nothing_when_it_is_found() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(statement):
            assert not isinstance(node, ast.Import | ast.ImportFrom)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_is_short(module: str) -> None:
    path = MODULES[module]
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    is_kernel = path.parent == CORE / "kernels"
    assert num_lines <= (MAX_KERNEL_LINES if is_kernel else MAX_LINES)


def undocumented(body: list[ast.stmt], owner: str) -> Iterator[str]:
    """Yield the public functions, methods and classes that say nothing of themselves."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{owner}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{owner}.{node.name}")


def test_everything_public_has_a_docstring() -> None:
    found = [
        name
        for path in CORE_FILES
        for name in undocumented(ast.parse(path.read_text("utf-8")).body, module_of(path))
    ]
    assert found == []


def test_every_module_has_a_docstring() -> None:
    for path in [*CORE_FILES, *NODE_FILES]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
