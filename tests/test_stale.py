import sys
from pathlib import Path

import pytest
import yaml
from shipped import Config, paths

from aasvd import layout, params, stale


@pytest.fixture
def made(local: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Settings in a folder with artifacts of three runs of a model of its own, none of which is listed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(local))
    for ratio in ("0.4", "0.5", "0.6"):
        found = paths(local, f"mine_r{ratio}")
        for folder in (found.calibration, found.original, found.compressed, found.evaluation):
            (folder / "block_000").mkdir(parents=True, exist_ok=True)
        for file in layout.phase_targets(
            local, params.parse_run(local, f"mine_r{ratio}"), "fetch", blocks=lambda: 0
        ):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    return local


def begin(run: str, file: str) -> None:
    """Write a file of a run's folder."""
    (Path("results") / run).mkdir(parents=True)
    (Path("results") / run / file).write_text("{}")


def test_a_run_refers_to_its_artifacts_from_its_first_stage_on(made: Config) -> None:
    shared = [paths(made).calibration, paths(made).original]
    own = {ratio: paths(made, f"mine_r{ratio}") for ratio in ("0.4", "0.5", "0.6")}
    assert {*shared, *(own[ratio].compressed for ratio in own)} < set(stale.stale(made))
    begin("mine_r0.5", "progress.json")
    begin("mine_r0.6", "eval.json")
    assert stale.stale(made) == sorted([own["0.4"].compressed, own["0.4"].evaluation])
    made["runs"] = ["mine_r0.4"]
    assert stale.stale(made) == []


@pytest.mark.parametrize(
    "name", ["compare", "mine_r1.5", "nobody_r0.6", "mine_r0.6_none", "mine_r0.6_svd_svd"]
)
def test_folders_of_no_run_are_passed_over(made: Config, name: str) -> None:
    everything = stale.stale(made)
    begin(name, "progress.json")
    assert stale.stale(made) == everything


def test_nothing_is_stale_while_a_source_is_away(made: Config, tmp_path: Path) -> None:
    """A disk that is not mounted changes the key of all that was made from what lies there."""
    begin("mine_r0.5", "progress.json")
    (tmp_path / "notes.txt").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"params\.yaml: texts\.notes\.path: \S+ does not exist"):
        stale.stale(made)


def test_what_is_stale_is_listed_and_on_request_removed(
    made: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin("mine_r0.5", "progress.json")
    begin("mine_r0.6", "progress.json")
    gone, kept = paths(made, "mine_r0.4").compressed, paths(made, "mine_r0.5").compressed
    monkeypatch.setattr(sys, "argv", ["stale"])
    stale.main()
    assert str(gone) in (listed := capsys.readouterr().out) and "2 stale" in listed
    assert gone.exists()
    monkeypatch.setattr(sys, "argv", ["stale", "--remove"])
    stale.main()
    assert kept.exists() and not gone.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "params.yaml"),
        ("seed: {", "params.yaml, line 1: not YAML"),
        ("seed: 0", "is a required property"),
    ],
)
def test_parameters_that_cannot_be_read_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("params.yaml").write_text(content)
    with pytest.raises(SystemExit) as raised:
        stale.main()
    assert message in str(raised.value.code) and "\n" not in str(raised.value.code)
