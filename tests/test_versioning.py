import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import dvc.repo
import pytest
import yaml
from workflow_copy import ROOT, SETTINGS, merged

from aasvd import layout, params, versioning
from aasvd.artifacts import write_json

RUN = SETTINGS["runs"][0]


class _Repo:
    """Stands for DVC's repository and notes what is committed to it."""

    committed: list[tuple[str, bool]]

    def __init__(self) -> None:
        pass

    def __enter__(self) -> "_Repo":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def commit(self, *, target: str, force: bool) -> None:
        self.committed.append((target, force))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder under DVC in which a tiny run is completely finished."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setattr(_Repo, "committed", [], raising=False)
    monkeypatch.setattr(dvc.repo, "Repo", _Repo)
    made = merged(yaml.safe_load((ROOT / "params.yaml").read_text()), SETTINGS)
    Path("params.yaml").write_text(yaml.safe_dump(made))
    shutil.copyfile(ROOT / "dvc.yaml", "dvc.yaml")
    Path(".dvc").mkdir()
    run = params.parse_run(made, RUN)
    paths = layout.Paths(made, run)
    write_json(paths.model / "outline.json", {"blocks": 2})
    for phase in layout.PHASES:
        for file in layout.phase_targets(made, run, phase, blocks=lambda: 2):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).touch()
    write_json(Path(f"results/{RUN}/eval.json"), {"provenance": {"keys": paths.publication()}})
    return made


def _lose(config: dict[str, Any], phase: str) -> None:
    run = params.parse_run(config, RUN)
    Path(layout.phase_targets(config, run, phase, blocks=lambda: 2)[-1]).unlink()


def test_everything_finished_is_recorded_at_once(config: dict[str, Any]) -> None:
    assert versioning.commit() == [*layout.PHASES, f"publish@{RUN}"]
    assert _Repo.committed == [("dvc.yaml", True)]


def test_a_stage_of_the_users_own_is_not_recorded_with_ours(config: dict[str, Any]) -> None:
    declared = yaml.safe_load(Path("dvc.yaml").read_text())
    declared["stages"]["plot"] = {"cmd": "python plot.py"}
    Path("dvc.yaml").write_text(yaml.safe_dump(declared))
    names = [*layout.PHASES, f"publish@{RUN}"]
    assert versioning.commit() == names
    assert _Repo.committed == [(name, True) for name in names]


@pytest.mark.parametrize("phase", layout.PHASES)
def test_an_unfinished_phase_is_not_recorded_nor_anything_published(
    config: dict[str, Any], phase: str
) -> None:
    _lose(config, phase)
    names = [name for name in layout.PHASES if name != phase]
    assert versioning.commit() == names
    assert _Repo.committed == [(name, True) for name in names]


def test_numbers_are_read_as_the_run_read_them(config: dict[str, Any]) -> None:
    """YAML takes 2e-3 for a string."""
    text = Path("params.yaml").read_text()
    assert config["refinement"]["learning_rate"] == 0.002
    Path("params.yaml").write_text(text.replace("learning_rate: 0.002\n", "learning_rate: 2e-3\n"))
    assert versioning.commit() == [*layout.PHASES, f"publish@{RUN}"]


def test_a_run_published_from_other_parameters_is_not_recorded(config: dict[str, Any]) -> None:
    write_json(Path(f"results/{RUN}/eval.json"), {"provenance": {"keys": {}}})
    assert versioning.commit() == list(layout.PHASES)
    Path(f"results/{RUN}/eval.json").unlink()
    assert versioning.commit() == list(layout.PHASES)


def test_a_model_that_is_not_fetched_leaves_nothing_to_record(config: dict[str, Any]) -> None:
    (layout.Paths(config, params.parse_run(config, RUN)).model / "outline.json").unlink()
    assert versioning.commit() == []


def test_a_phase_counts_when_every_run_has_it(config: dict[str, Any]) -> None:
    config["runs"].append("tiny_r0.5")
    Path("params.yaml").write_text(yaml.safe_dump(config))
    assert versioning.commit() == ["fetch", "sample", "capture"]
    config["runs"].pop()


def test_nothing_is_recorded_inside_dvc_or_without_it(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "compress")
    assert versioning.commit() == []
    monkeypatch.delenv("DVC_STAGE")
    Path(".dvc").rmdir()
    assert versioning.commit() == []
    assert _Repo.committed == []
