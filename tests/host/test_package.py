"""The package of Comfy's registry: what git tracks less what .comfyignore names, in a ComfyUI."""

import inspect
import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.host.conftest import Host
from tests.host.process import FLAGS, PACK, make_environment
from tests.host.test_server import NODES

OPTIONAL = {"triton"}
"""What a module may miss that only some machines load: the kernels of an NVIDIA GPU."""
LEFT_OUT = ("tests", "research", "benchmarks", ".ci")


def list_tracked(*options: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *options], cwd=PACK, check=True, capture_output=True, text=True
    )
    return {name for name in listed.stdout.split("\0") if (PACK / name).is_file()}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, zipped as `comfy node publish` does."""
    if not (PACK / ".git").exists():
        pytest.skip("needs a git checkout: the package is made of what git tracks")
    path = tmp_path_factory.mktemp("package") / "node.zip"
    names = list_tracked() - list_tracked("-ci", "--exclude-from=.comfyignore")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(names):
            archive.write(PACK / name, name)
    return path


def test_it_holds_what_the_readme_links_to_and_nothing_of_the_workshop(package: Path) -> None:
    held = set(zipfile.ZipFile(package).namelist())
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", readme) if "://" not in link}
    assert len(links) > 5 and links <= held, links - held
    assert not [name for name in held if name.partition("/")[0] in LEFT_OUT]
    assert {name for name in held if name.startswith("results/")} <= links
    assert package.stat().st_size < 12e6


def load_package() -> None:
    """Load custom_nodes as ComfyUI does, then every module of the pack; tell what there is."""
    import asyncio
    import collections
    import importlib
    import json
    import pkgutil
    import sys

    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    asyncio.run(nodes.init_external_custom_nodes())
    registered = [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("LinVideo")]
    (pack,) = (name for name in sys.modules if name.endswith("custom_nodes/linvideo"))
    without = collections.Counter()
    for part in ("linvideo_core", "nodes"):
        package = importlib.import_module(f"{pack}.{part}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                if not module.name.endswith(".__main__"):
                    importlib.import_module(module.name)
            except ModuleNotFoundError as missing:
                without[missing.name] += 1
    names = collections.defaultdict(set)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if "custom_nodes/linvideo/" in file.replace("\\", "/"):
            names[file].add(name)
    twice = [sorted(found) for found in names.values() if len(found) > 1]
    found = {"registered": registered, "modules": len(names), "twice": twice, "without": without}
    print(json.dumps(found))


@pytest.mark.host
def test_a_comfyui_loads_it_and_each_of_its_modules_once(
    package: Path, host: Host, tmp_path: Path
) -> None:
    folder = tmp_path / "custom_nodes" / "linvideo"
    zipfile.ZipFile(package).extractall(folder)
    source = f"{inspect.getsource(load_package)}\nload_package()"
    finished = subprocess.run(
        [host.python, "-c", source, *FLAGS, "--base-directory", str(tmp_path)],
        cwd=host.root,
        env=make_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not finished.returncode, finished.stderr[-4000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert set(found["registered"]) == NODES.keys()
    files = [p for part in ("linvideo_core", "nodes") for p in (folder / part).rglob("*.py")]
    shipped = [path for path in files if path.name != "__main__.py"]
    assert found["without"].keys() <= OPTIONAL, found["without"]
    num_loaded = len(shipped) - sum(found["without"].values())
    assert found["modules"] == num_loaded + 1  # and the pack's own
    assert found["twice"] == []
