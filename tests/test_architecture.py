"""The house, read from the source: who imports whom, and how long a file may be."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED, OUTSIDE = ("linvideo_core", "nodes"), ("benchmarks", "research")

# A folder of the core imports only folders of earlier lines, whatever lies in between.
LAYERS = (
    {"linvideo_core"},
    {"flow", "run", "kernels", "demo"},
    {"training", "models"},
    {"artifact", "prompts"},
    {"teacher", "pipelines"},
    {"evaluate"},
    {"transfer"},
    {"distill"},
    {"nodes"},
    {"benchmarks"},
    {"research"},
)
MAX_LINES = 500


def module_of(path: Path) -> str:
    """Return a file's dotted name from the repository's root, such as "linvideo_core.flow"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path
    for folder in (*SHIPPED, *OUTSIDE)
    for path in sorted((ROOT / folder).rglob("*.py"))
}
SHIPPED_MODULES = {name: path for name, path in MODULES.items() if name.startswith(SHIPPED)}


def resolve(path: Path, node: ast.ImportFrom) -> Iterator[str]:
    """Yield the absolute modules that a `from ... import` in a file names."""
    base = node.module or ""
    if node.level:
        package = path.relative_to(ROOT).parent.parts
        # From a node the core is one level above the pack, which has no name of its own.
        package = package[: max(0, len(package) - node.level + 1)]
        base = ".".join([*package, *([node.module] if node.module else [])])
    # The name under which the benchmark of ComfyUI loads the pack.
    base = base.removeprefix("linvideo_pack.")
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        yield submodule if submodule in MODULES or node.level == 0 else base


def walk(node: ast.AST, *, is_loading: bool) -> Iterator[ast.AST]:
    """Yield what lies in a node; while a file is loading, its functions are not run."""
    for child in ast.iter_child_nodes(node):
        if not (is_loading and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield child
            yield from walk(child, is_loading=is_loading)


def imports_of(path: Path, *, is_loading: bool = False) -> set[str]:
    """Return every absolute module that a file imports anywhere, or only when it is loaded."""
    found: set[str] = set()
    for node in walk(ast.parse(path.read_text(encoding="utf-8")), is_loading=is_loading):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= set(resolve(path, node))
    return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def own(imported: str) -> str | None:
    """Return the module of ours that an imported name is, or is taken from."""
    while imported not in MODULES and "." in imported:
        imported = imported.rpartition(".")[0]
    return imported if imported in MODULES else None


def folder_of(module: str) -> str:
    """Return what of `LAYERS` a module belongs to."""
    top, *rest = module.split(".")
    return rest[0] if top == "linvideo_core" and rest else top


def importers(prefix: str, modules: dict[str, Path] = SHIPPED_MODULES) -> set[str]:
    """Return the modules that import a module or what lies below it."""
    return {
        name
        for name in modules
        for imported in IMPORTS[name]
        if imported == prefix or imported.startswith(f"{prefix}.")
    }


def test_every_file_imports_only_folders_of_earlier_layers() -> None:
    rank = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}
    wrong = {
        f"{module} -> {target}"
        for module, names in IMPORTS.items()
        for target in filter(None, map(own, names))
        if folder_of(target) != folder_of(module)
        and rank[folder_of(target)] >= rank[folder_of(module)]
    }
    assert wrong == set()


def test_no_file_imports_itself_by_a_detour() -> None:
    graph = {m: {own(name) for name in names} - {m, None} for m, names in IMPORTS.items()}
    TopologicalSorter(graph).prepare()


def test_no_file_imports_a_command() -> None:
    assert not {t for names in IMPORTS.values() for t in names if t.endswith("__main__")}


@pytest.mark.parametrize("host", ["comfy", "comfy_api", "comfy_extras", "folder_paths"])
def test_core_never_imports_the_host(host: str) -> None:
    assert not {name for name in importers(host) if name.startswith("linvideo_core")}


def test_what_ships_is_imported_only_relatively() -> None:
    """ComfyUI loads the pack under the name of its folder, and has a module `nodes` of its own."""
    for module, path in SHIPPED_MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            tops = {name.split(".")[0] for name in names}
            assert not tops & {*SHIPPED, *OUTSIDE}, module


# A package -> the only modules of what ships that may import it.
KEEPERS = {
    "triton": {
        "linvideo_core.kernels.triton_kernels",
        "linvideo_core.kernels.triton_launch",
        "linvideo_core.kernels.qk_norm_rope_triton",
        "linvideo_core.kernels.hybrid_triton",
    },
    "argparse": {"linvideo_core.run.config"},
    "torch.distributed": {"linvideo_core.training.fsdp"},
    "transformers": {"linvideo_core.prompts.text_encoder"},
    "tokenizers": {"linvideo_core.prompts.text_encoder"},
    "sentencepiece": {"linvideo_core.prompts.text_encoder"},
    "ftfy": {"linvideo_core.prompts.text_encoder"},
    "matplotlib": {"linvideo_core.evaluate.plots"},
    "diffusers": {"linvideo_core.evaluate.autoencoder"},
    "imageio_ffmpeg": {"linvideo_core.evaluate.videos"},
}


@pytest.mark.parametrize("package", KEEPERS)
def test_a_package_is_known_to_few_files(package: str) -> None:
    assert importers(package) <= KEEPERS[package]


def test_what_draws_nothing_loads_neither_matplotlib_nor_the_text_encoder() -> None:
    loaded = {name: imports_of(p, is_loading=True) for name, p in SHIPPED_MODULES.items()}
    heavy = {"matplotlib", "sklearn", "transformers", "ftfy", "diffusers", "imageio_ffmpeg"}
    slow: set[str] = set()
    size = -1
    while size < len(slow):
        size = len(slow)
        for module, names in loaded.items():
            tops = {name.partition(".")[0] for name in names}
            if tops & heavy or set(map(own, names)) & slow:
                slow.add(module)
    plots = "linvideo_core.evaluate.plots"
    drawing = {plots, *importers(plots), *importers("linvideo_core.evaluate.videos")}
    assert plots in slow
    assert {m for m in slow - drawing if not m.endswith((".cli", ".command", ".__main__"))} == set()


def test_the_pack_imports_nothing_when_it_is_found() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(statement):
            assert not isinstance(node, ast.Import | ast.ImportFrom)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_is_short_and_says_what_it_is(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text))


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


def test_everything_public_in_the_core_has_a_docstring() -> None:
    found = [
        name
        for module, path in SHIPPED_MODULES.items()
        if module.startswith("linvideo_core")
        for name in undocumented(ast.parse(path.read_text("utf-8")).body, module)
    ]
    assert found == []
