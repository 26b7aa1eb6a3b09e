import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from shipped import ROOT, Config, paths, where

from aasvd import layout, params


def test_runs_are_found_again_by_their_keys(local: Config) -> None:
    for name in (
        "mine_r0.6",
        "mine_r0.55",
        "mine_r0.6666667",
        "mine_r0.00001234567",
        "mine_r0.6_norefine",
        "mine_r0.6_anchored",
        "mine_r0.6_saes-svd",
        "mine_r0.6_saes-svd_refine",
        "mine_r0.6_anchored_norefine",
    ):
        made = paths(local, name)
        found = layout.find_run(
            local, model="mine", calibration=made.calibration.name, compression=made.compressed.name
        )
        assert where(layout.Paths(local, found)) == where(made), name
        wanted = params.parse_run(local, name).settings["compression"]
        # Methods that do the same share their artifacts, whatever they are called.
        assert {**found.settings["compression"], "method": ""} == {**wanted, "method": ""}
    for measurement in made.measurements():
        found = layout.find_measurement(local, model="mine", measurement=measurement.removesuffix(".json"))
        assert measurement in layout.Paths(local, found).measurements()


def test_names_that_no_run_can_have_do_not_hide_the_runs_behind_them(local: Config) -> None:
    variants = {
        "eight": {"compression": {"precision": "int8"}},
        "remapped": {"compression": {"storage": "remapped"}},
        "seven": {"seed": 7},
        "eager": {"compression": {"ridge": 0.125}},
    }
    config = {**local, "variants": variants}
    with pytest.raises(ValueError, match="int8 does not go with"):
        params.parse_run(config, "mine_r0.6_eight_remapped")
    run = params.parse_run(config, "mine_r0.6_seven_eager")
    made = layout.Paths(config, run)
    found = layout.find_run(
        config, model="mine", calibration=made.calibration.name, compression=made.compressed.name
    )
    assert found.settings == run.settings


def test_keys_of_other_parameters_are_refused(local: Config) -> None:
    made = paths(local)
    with pytest.raises(ValueError, match=r"made with other parameters \(see key\.json"):
        layout.find_run(local, model="mine", calibration="0" * 10)
    with pytest.raises(ValueError, match=r"compression key r0\.6-0000000000"):
        layout.find_run(
            local, model="mine", calibration=made.calibration.name, compression="r0.6-" + "0" * 10
        )
    with pytest.raises(ValueError, match=r"no run of today.s params\.yaml makes the measurement"):
        layout.find_measurement(local, model="mine", measurement="perplexity_notes-0")


def test_a_source_is_asked_for_under_todays_key_alone(local: Config) -> None:
    for todays in (
        layout.model_folder(local, "mine"),
        layout.text_file(local, "notes", "test").parent,
        layout.task_file(local, "piqa").parent,
    ):
        layout.require_key(todays.name, todays)
        with pytest.raises(
            ValueError, match=rf"lies in {todays.parent}/0000000000, its key is {todays.name};"
        ):
            layout.require_key("0" * 10, todays)


@pytest.mark.parametrize("phase", layout.PHASES)
def test_the_files_of_a_phase_lie_in_the_outputs_of_its_dvc_stage(local: Config, phase: str) -> None:
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][phase]
    outputs = [path for out in stage["outs"] for path in out]
    assert all(out[path]["persist"] for out in stage["outs"] for path in out)
    files = layout.phase_targets(local, params.parse_run(local, "mine_r0.6"), phase, blocks=lambda: 3)
    assert files
    for file in files:
        assert any(Path(file).is_relative_to(output) for output in outputs), file


def test_published_files_lie_in_the_outputs_of_their_dvc_stage() -> None:
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["publish"]["do"]
    outputs = {path for kind in ("outs", "metrics", "plots") for out in stage[kind] for path in out}
    assert outputs == {
        f"results/${{item}}/{name}"
        for name in ("model", "results.html", "eval.json", "figures/distortion.svg", "blocks.json")
    }


def test_dvc_stages_watch_parameters_that_exist(config: Config) -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(stages) == [*layout.PHASES, "publish"]
    for name, stage in stages.items():
        for key in stage.get("do", stage)["params"]:
            section, _, inner = key.partition(".")
            assert not inner or inner in config[section], f"{name}: {key}"
            assert section in config, f"{name}: {key}"
    # Artifacts of all parameters lie side by side: what a run's numbers are made from, only parameters say.
    for stage in (stages["evaluate"], stages["publish"]["do"]):
        assert {*stage["params"], "runs", "comparison", "comparisons"} == set(config)


def test_only_the_files_of_early_phases_need_no_number_of_blocks(local: Config) -> None:
    def unknown() -> int:
        raise AssertionError("asked for the number of blocks")

    run = params.parse_run(local, "mine_r0.6")
    for phase in ("fetch", "sample", "evaluate"):
        layout.phase_targets(local, run, phase, blocks=unknown)
    with pytest.raises(AssertionError):
        layout.phase_targets(local, run, "compress", blocks=unknown)


def test_a_run_is_published_as_long_as_its_keys_are_todays(
    local: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def published() -> bool:
        run = params.parse_run(local, "mine_r0.6")
        return layout.is_published(run, layout.Paths(local, run))

    assert published()  # nothing is out of date where nothing is
    file = Path("results/mine_r0.6/eval.json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"provenance": {"keys": paths(local).publication()}}))
    assert published()
    for change in (
        {"refinement": {"epochs": 1}},
        {"evaluation": {"limit": 1}},
        {"calibration": {"tokens": 2}},
    ):
        ((section, changed),) = change.items()
        kept = dict(local[section])
        local[section].update(changed)
        assert not published(), section
        local[section].update(kept)
    assert published()


def test_published_runs_are_those_whose_checkpoint_is_todays(
    local: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was measured of it; other ratios, and names that params.yaml does not know, do not count."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine_r0.6", "mine_r0.6_svd", "mine_r0.6_svd_refine", "mine_r0.8"):
        file = Path("results") / name / "eval.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"provenance": {"keys": paths(local, name).publication()}}))
    shutil.copytree("results/mine_r0.6", "results/mine_r0.6_unknown")
    assert set(layout.published_runs(local, "mine", "0.6")) == {
        *("mine_r0.6", "mine_r0.6_svd", "mine_r0.6_svd_refine"),
    }
    local["evaluation"]["limit"] = 1
    assert len(layout.published_runs(local, "mine", "0.6")) == 3
    local["refinement"]["epochs"] = 1  # `svd` has none, and `refine` its own
    assert set(layout.published_runs(local, "mine", "0.6")) == {"mine_r0.6_svd", "mine_r0.6_svd_refine"}
    local["calibration"]["tokens"] = 2
    assert not layout.published_runs(local, "mine", "0.6")


Maker = Callable[[Config, str], object]


@pytest.mark.parametrize("make", [layout.model_folder, lambda c, n: layout.text_file(c, n, "test")])
def test_names_that_are_in_no_registry_are_refused(local: Config, make: Maker) -> None:
    with pytest.raises(ValueError, match=r"unknown (model|text) 'nobody'; params\.yaml has "):
        make(local, "nobody")
