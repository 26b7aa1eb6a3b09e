"""Laws that hold for every module of the package, read from its source."""

import ast
from pathlib import Path

import pytest

import aasvd

MODULES = [path for path in sorted(Path(aasvd.__file__).parent.glob("*.py")) if path.stem != "__init__"]

# Each may import only those before it.
ORDER = [
    "methods",
    "params",
    "artifacts",
    "device",
    "progress",
    "rank",
    "covariance",
    "solve",
    "objectives",
    "knapsack",
    "allocation",
    "lowrank",
    "rounding",
    "pivoted",
    "quantized",
    "formats",
    "weights",
    "attention",
    "capture",
    "layers",
    "blocks",
    "fusion",
    "latents",
    "gradients",
    "measures",
    "refine",
    "adapt",
    "compress",
    "checkpoint",
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
    "stages",
    "command",
    "versioning",
    "stale",
    "bench",
    "bench_inference",
    "export",
    "vllm_plugin",
]


def imported(path: Path) -> set[str]:
    """Return the modules of the package that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "aasvd":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("aasvd.")):
            names.add((node.module or "").removeprefix("aasvd.").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("aasvd.")}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_only_downwards(path: Path) -> None:
    assert path.stem in ORDER, (
        f"{path.name} has no place in ORDER yet: put it after every module that it imports"
    )
    late = imported(path) - set(ORDER[: ORDER.index(path.stem)])
    assert not late, f"{path.name} imports {', '.join(sorted(late))}, which ORDER puts at or after it"


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
