"""Laws that hold for every module of the package, read from its source."""

import ast
import tomllib
from pathlib import Path

import pytest

import aasvd

FOLDER = Path(aasvd.__file__).parent
MODULES = [path for path in sorted(FOLDER.rglob("*.py")) if path != FOLDER / "__init__.py"]

# Each may import only those before it.
ORDER = [
    "methods",
    "params",
    "targets",
    "identity",
    "layout",
    "artifacts",
    "device",
    "provenance",
    "progress",
    "rank",
    "likelihood",
    "covariance",
    "solve",
    "objectives",
    "knapsack",
    "allocation",
    "lowrank",
    "rounding",
    "pivoted",
    "pruned",
    "quantized",
    "formats",
    "lora",
    "weights",
    "attention",
    "capture",
    "blocks",
    "units",
    "pruning",
    "fusion",
    "latents",
    "gradients",
    "measures",
    "muon",
    "refine",
    "layers",
    "adapt",
    "truncation",
    "compress",
    "checkpoint",
    "wikipedia",
    "sources",
    "calibration",
    "harness",
    "evaluate",
    "memory",
    "tables",
    "figures",
    "results",
    "report",
    "paper",
    "comparison",
    "stages.stage",
    "stages.loading",
    "stages.fetching",
    "stages.originals",
    "stages.ranks",
    "stages.removals",
    "stages.compression",
    "stages.checkpoints",
    "stages.evaluation",
    "stages.publication",
    "stages",
    "workers",
    "command",
    "versioning",
    "stale",
    "bench",
    "bench_inference",
    "export",
    "vllm_plugin",
]


def name_of(path: Path) -> str:
    """Return a module's name inside the package; a subpackage's is that of its folder."""
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in MODULES}


def imported(path: Path) -> set[str]:
    """Return the modules of the package that a module imports, anywhere in it."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    inside = {name.removeprefix("aasvd.") for name in named if name.startswith("aasvd.")}
    # What is imported is a module, or something in one.
    return {name if name in NAMES else name.rpartition(".")[0] for name in inside} & NAMES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_import_only_downwards(path: Path) -> None:
    name = name_of(path)
    assert name in ORDER, f"{name} has no place in ORDER yet: put it after every module that it imports"
    late = imported(path) - set(ORDER[: ORDER.index(name)])
    assert not late, f"{name} imports {', '.join(sorted(late))}, which ORDER puts at or after it"


def test_every_subpackage_is_installed() -> None:
    described = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(FOLDER.parent) for path in MODULES}
    assert {".".join(folder.parts) for folder in folders} == set(described["tool"]["setuptools"]["packages"])


def test_no_module_can_unpickle() -> None:
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            elif isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in {"torch.load", "np.load", "numpy.load", "pd.read_pickle"}, (
                    f"{path}: {call}"
                )
