import itertools
from pathlib import Path
from typing import Any

import pytest
from shipped import Config, paths, where

from aasvd import identity, layout, params

# What moves when a setting changes; everything else has to stay where it is.
COMPRESSED = {"compressed", "checkpoint", "evaluation"}
ORIGINAL = COMPRESSED | {"calibration", "original"}


@pytest.mark.parametrize(
    ("section", "key", "value", "moved"),
    [
        ("calibration", "sequences", 7, ORIGINAL),
        ("calibration", "tokens", 7, ORIGINAL),
        ("calibration", "sampling", "sequential", ORIGINAL),
        ("calibration", "dtype", "bfloat16", ORIGINAL),
        ("calibration", "text", "lee-news", ORIGINAL),
        ("calibration", "batch", 3, set()),
        ("calibration", "keep_activations", False, set()),
        ("compression", "keep_factors", False, set()),
        ("compression", "objective", "anchored", COMPRESSED),
        ("compression", "ridge", 0.1, COMPRESSED),
        ("compression", "storage", "factors", COMPRESSED),
        ("compression", "precision", "int8", COMPRESSED),
        ("compression", "blend", 0.1, set()),
        ("compression", "buckets", 7, set()),
        ("compression", "probe", 7, set()),
        ("compression", "dobi", {"epochs": 7}, set()),
        ("compression", "ranks_file", "nowhere", set()),
        ("compression", "allocation", "uniform", COMPRESSED),
        ("post", "rank", 3, set()),
        ("refinement", "epochs", 3, COMPRESSED),
        ("refinement", "batch", 3, COMPRESSED),
        ("refinement", "learning_rate", 0.5, COMPRESSED),
        ("refinement", "weight_decay", 0.5, COMPRESSED),
        ("refinement", "clip", 0.5, COMPRESSED),
        ("refinement", "shuffle", False, COMPRESSED),
        ("evaluation", "texts", ["lee-news"], set()),
        ("evaluation", "window", 7, set()),
        ("evaluation", "batch", 3, set()),
    ],
)
def test_a_setting_moves_exactly_what_it_determines(
    local: Config, section: str, key: str, value: Any, moved: set[str]
) -> None:
    before = paths(local)
    local[section][key] = value
    after = paths(local)
    assert {name for name, path in where(after).items() if path != where(before)[name]} == moved


def test_methods_that_do_the_same_share_their_artifacts(local: Config) -> None:
    compression = {"objective": "input_aware", "allocation": "uniform", "storage": "factors"}
    local["variants"]["plain"] = {"compression": compression, "refinement": {"epochs": 0}}
    same = [where(paths(local, f"mine_r0.6_{name}")) for name in ("drone", "svd-llm-w", "aasvd_plain")]
    assert same[0] == same[1] == same[2]


def test_only_shifted_or_refined_blocks_are_passed_through(config: Config) -> None:
    for name, expected in {
        "svd-llm-w": ["solve"],
        "norefine": ["solve"],
        "dobi-svd": ["solve", "propagate"],
        "svd_refine": ["solve", "refine", "propagate"],
        "anchored_norefine": ["solve", "propagate"],
        "shortgpt": ["solve"],
        "blockpruner_refine": ["solve", "refine", "propagate"],
        "wanda-sp": ["solve", "propagate"],
    }.items():
        assert layout.block_stages(params.parse_run(config, f"llama7b_r0.6_{name}")) == expected


def test_an_order_of_removal_is_one_file_for_all_ratios(local: Config) -> None:
    runs = [params.parse_run(local, f"mine_r{ratio}_blockpruner") for ratio in (0.4, 0.8)]
    files = [layout.measure_files(run, blocks=3) for run in runs]
    assert files[0] == files[1] == {"removal-4": ["measures/removal-4.safetensors"]}
    assert layout.original_files(runs[0]) == {"covariances.safetensors": "capture.json"}
    found = layout.phase_targets(local, runs[0], "capture", blocks=lambda: 3)
    assert [Path(file).name for file in found].count("removal-4.safetensors") == 1
    local["methods"]["blockpruner"]["compression"]["probe"] = 2
    other = params.parse_run(local, "mine_r0.4_blockpruner")
    assert params.measures(other) == ["removal-2"]
    by_block = layout.measure_files(params.parse_run(local, "mine_r0.4_shortgpt"), blocks=2)
    assert by_block == {"profile": [f"block_00{block}/measures/profile.safetensors" for block in range(2)]}


def test_ranks_of_a_file_count_by_its_content(local: Config, tmp_path: Path) -> None:
    local["compression"] |= {"allocation": "file", "ranks_file": str(tmp_path / "ranks.json")}
    with pytest.raises(ValueError, match=r"run 'mine_r0\.6': .*ranks_file .*ranks\.json' is no file"):
        paths(local)
    (tmp_path / "ranks.json").write_text("{}")
    before = paths(local).compressed
    (tmp_path / "ranks.json").write_text('{"a": 1}')
    assert paths(local).compressed != before


def test_trained_positions_are_shared_by_what_is_trained_alike(local: Config) -> None:
    def file(run: str) -> Path | None:
        return paths(local, f"mine_{run}").positions

    local["variants"]["longer"] = {"compression": {"dobi": {"epochs": 30}}}
    local["variants"]["pivoted"] = {"compression": {"storage": "pivoted"}}
    trained = file("r0.6_dobi-svd-trained")
    assert trained is not None
    assert trained.is_relative_to(paths(local).original)
    assert file("r0.6_dobi-svd") is None
    # Neither refinement nor the objective matters to the training; ratio, cost of a rank and recipe do.
    assert file("r0.6_dobi-svd-trained_refine") == trained
    local["variants"]["other"] = {"compression": {"objective": "input_aware"}}
    assert file("r0.6_dobi-svd-trained_other") == trained
    others = [file(f"r{run}") for run in ("0.5_dobi-svd-trained", "0.6_dobi-svd-trained_longer")]
    others += [file("r0.6_dobi-svd-trained_pivoted")]
    assert len({trained, *others}) == 4
    # An override of one setting leaves the others.
    longer = params.parse_run(local, "mine_r0.6_dobi-svd-trained_longer").settings["compression"]
    assert longer["dobi"] == local["compression"]["dobi"] | {"epochs": 30}
    found = layout.find_run(
        local, model="mine", calibration=paths(local).calibration.name, positions=trained.stem
    )
    assert layout.Paths(local, found).positions == trained
    with pytest.raises(ValueError, match=r"positions key r0\.6-0000000000 for model mine"):
        layout.find_run(
            local, model="mine", calibration=paths(local).calibration.name, positions="r0.6-0000000000"
        )


def test_settings_of_training_move_the_ranks_and_what_follows(
    local: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mine_r0.6_dobi-svd-trained"
    before = where(paths(local, name))
    local["compression"]["dobi"]["penalty"] = 20.0
    changed = where(paths(local, name))
    assert {key for key in before if before[key] != changed[key]} == {*COMPRESSED, "positions"}
    monkeypatch.setitem(identity.VERSIONS, "positions", identity.VERSIONS["positions"] + 1)
    newer = where(paths(local, name))
    assert {key for key in before if changed[key] != newer[key]} == {*COMPRESSED, "positions"}
    files = layout.phase_targets(local, params.parse_run(local, name), "capture", blocks=lambda: 1)
    assert str(newer["positions"]) in files


def test_a_post_step_has_a_checkpoint_of_its_own(local: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    local["compression"]["storage"] = "factors"
    before, adapted = paths(local).compressed, paths(local, "mine_r0.6_svd-llm").checkpoint
    monkeypatch.setitem(identity.VERSIONS, "post", identity.VERSIONS["post"] + 1)
    assert paths(local).compressed == before and paths(local, "mine_r0.6_svd-llm").checkpoint != adapted
    local["post"]["epochs"] = 3
    assert paths(local).compressed != before
    local["post"]["epochs"] = 0
    assert paths(local, "mine_r0.6_svd-llm").checkpoint.name == "adapted"
    assert paths(local, "mine_r0.6_svd-llm-w").checkpoint.name == "model"


def test_blend_counts_where_it_is_used(local: Config) -> None:
    local["compression"]["objective"] = "blended"
    before = paths(local)
    local["compression"]["blend"] = 0.1
    assert paths(local).compressed != before.compressed


def test_refinement_settings_do_not_count_where_it_is_off(local: Config) -> None:
    local["refinement"]["epochs"] = 0
    before = paths(local)
    local["refinement"]["learning_rate"] = 0.5
    assert paths(local).compressed == before.compressed


def test_seed_and_ratio_move_what_they_determine(local: Config) -> None:
    before = paths(local)
    assert paths(local, "mine_r0.5").original == before.original
    assert paths(local, "mine_r0.5").compressed != before.compressed
    assert paths(local, "mine_r0.5").dense_evaluation == before.dense_evaluation
    local["seed"] = 1
    assert paths(local).original != before.original


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("window", 7, {"perplexity"}),
        ("windows", 7, {"perplexity"}),
        ("limit", 7, {"accuracy"}),
        ("batch", 7, set()),
    ],
)
def test_an_evaluation_setting_renames_only_its_measurements(
    local: Config, key: str, value: int, changed: set[str]
) -> None:
    before = paths(local).measurements()
    local["evaluation"][key] = value
    after = paths(local).measurements()
    assert {new.split("_")[0] for old, new in zip(before, after, strict=True) if old != new} == changed


@pytest.mark.parametrize("kind", ["model", "text", "task", "calibration", "compression", "evaluation"])
def test_a_format_version_moves_its_artifacts(
    local: Config, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything() -> dict[str, object]:
        found = paths(local)
        return {
            **where(found),
            "text": layout.text_file(local, "notes", "train"),
            "task": layout.task_file(local, "piqa"),
            "measurements": found.measurements(),
            "unkeyed": layout.unkeyed_measurement("layers_000"),
        }

    before = everything()
    monkeypatch.setitem(identity.VERSIONS, kind, identity.VERSIONS[kind] + 1)
    after = everything()
    own = {"evaluation": "measurements", "compression": "compressed"}.get(kind, kind)
    assert before[own] != after[own]
    assert (before["unkeyed"] != after["unkeyed"]) == (kind == "evaluation")


@pytest.mark.parametrize(("file", "moved"), [("model/model.safetensors", "model"), ("notes.txt", "text")])
def test_other_bytes_in_a_local_source_are_another_source(
    local: Config, tmp_path: Path, file: str, moved: str
) -> None:
    def folder() -> Path:
        return paths(local).model if moved == "model" else layout.text_file(local, "notes", "train")

    before, original = folder(), paths(local).original
    (tmp_path / file).write_bytes(b"x" + (tmp_path / file).read_bytes()[1:])
    assert folder() != before
    assert paths(local).original != original


def test_rows_of_a_task_count_by_their_content(local: Config, tmp_path: Path) -> None:
    before = layout.task_file(local, "piqa")
    (tmp_path / "piqa.jsonl").write_text('{"goal": ""}\n')
    assert layout.task_file(local, "piqa") != before
    assert layout.task_file(local, "winogrande") == layout.task_file(local | {"data_dir": ""}, "winogrande")


def test_content_is_sampled_all_over_large_weights(tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    file.write_bytes(bytes(4 << 20))
    before = identity._content({"path": str(file)})
    for start in range(0, 4 << 20, 1 << 16):  # any sixteenth of a megabyte that is written anew shows
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(b"\1" * (1 << 16))
        assert identity._content({"path": str(file)}) != before
        file.write_bytes(bytes(4 << 20))


@pytest.mark.parametrize("name", ["corpus.txt", "rows.jsonl", "ranks.json"])
def test_every_byte_of_other_files_counts(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(bytes(4 << 20))
    before = identity._content({"path": str(file)})
    for place in range(40_000, 4 << 20, 500_000):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"\1")
        assert identity._content({"path": str(file)}) != before, place
        file.write_bytes(bytes(4 << 20))


def test_hidden_files_beside_a_model_are_no_part_of_it(local: Config, tmp_path: Path) -> None:
    before = paths(local).model
    for name in (".git/index", ".cache/huggingface/x.lock", ".DS_Store"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text("x")
        assert paths(local).model == before, name
    (tmp_path / "model" / "config.json").write_text("{}")
    assert paths(local).model != before


def test_sources_below_the_home_folder_count_by_their_content(
    local: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "ranks.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    local["models"]["mine"] = {"path": "~/model"}
    local["texts"]["notes"] = {"path": "~/notes.txt"}
    local["data_dir"] = "~"
    local["compression"] |= {"allocation": "file", "ranks_file": "~/ranks.json"}

    def compression() -> object:
        return identity.compression_ingredients(local, params.parse_run(local, "mine_r0.6"))["compression"]

    made_from = {
        "model/model.safetensors": lambda: layout.model_folder(local, "mine"),
        "notes.txt": lambda: layout.text_file(local, "notes", "train"),
        "wikitext2/train.txt": lambda: layout.text_file(local, "wikitext2", "train"),
        "piqa.jsonl": lambda: layout.task_file(local, "piqa"),
        "ranks.json": compression,
    }
    for name, made in made_from.items():
        before = made()
        (tmp_path / name).write_text(f"another {name}")
        assert made() != before, name


def test_keys_do_not_depend_on_the_order_of_settings() -> None:
    keys = {
        identity.key_of(dict(order)) for order in itertools.permutations([("a", 1), ("b", [2]), ("c", None)])
    }
    (key,) = keys
    assert len(key) == 10 and int(key, 16) >= 0
