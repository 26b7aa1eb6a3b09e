import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from shipped import Config, paths, where

from aasvd import layout, methods, params
from aasvd.rank import uniform_rank


def schema_properties(node: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every property of a schema, however deep, with its name."""
    if isinstance(node, Mapping):
        for name, value in node.get("properties", {}).items():
            yield f"{place}.{name}", value
        for name, value in node.items():
            yield from schema_properties(value, f"{place}.{name}")


# --- the schema -------------------------------------------------------------------------------------------


def test_shipped_parameters_are_valid(config: Config) -> None:
    params.validate(config)
    assert {
        "llama7b",
        "llama2-7b",
        "llama2-13b",
        "llama3-1b",
        "llama3-8b",
        "qwen2.5-7b",
        "smollm2-135m",
    } <= set(config["models"])


def test_every_key_of_the_schema_says_what_it_is_and_none_has_a_default() -> None:
    schema = yaml.safe_load(params.SCHEMA.read_text())
    properties = dict(schema_properties(schema))
    assert len(properties) > 40
    for name, value in properties.items():
        assert "default" not in value, name
        # Sections of a variant refer to definitions that describe each key.
        if "$ref" not in value or not set(value) <= {"$ref", "required", "properties"}:
            assert value.get("description"), f"{name} has no description"


def test_no_object_of_the_schema_takes_unknown_keys() -> None:
    def objects(node: Any) -> Iterator[Mapping[str, Any]]:
        if isinstance(node, Mapping):
            if node.get("type") == "object":
                yield node
            for value in node.values():
                yield from objects(value)

    schema = yaml.safe_load(params.SCHEMA.read_text())
    for node in objects(schema):
        assert node.get("additionalProperties") is False or isinstance(
            node["additionalProperties"], Mapping
        ), node


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["refinment"], {}, r"refinment"),
        (["calibration", "sequence"], 3, r"calibration: .*sequence"),
        (["compression", "ridge"], math.nan, r"compression\.ridge: expected a finite number"),
        (["refinement", "learning_rate"], math.inf, r"refinement\.learning_rate: expected a finite number"),
        (["calibration", "sequences"], "many", r"calibration\.sequences: 'many' is not of type 'integer'"),
        (["calibration", "sequences"], 0, r"calibration\.sequences: 0 is less than the minimum of 1"),
        (["calibration", "sampling"], "best", r"calibration\.sampling: 'best' is not one of .*'sequential'"),
        (["calibration", "batch"], True, r"calibration\.batch: True is not of type 'integer'"),
        (["compression", "objective"], "obj4", r"compression\.objective: unknown objective 'obj4'; there"),
        (["compression", "storage"], "zip", r"compression\.storage: 'zip' is not one of .*pivoted"),
        (["compression", "blend"], 1.5, r"compression\.blend: 1\.5 is greater than the maximum of 1"),
        (["refinement", "learning_rate"], 0, r"refinement\.learning_rate: 0 is less than or equal to"),
        (["refinement", "shuffle"], "no", r"refinement\.shuffle: 'no' is not of type 'boolean'"),
        (["evaluation", "window"], 1, r"evaluation\.window: 1 is less than the minimum of 2"),
        (["evaluation", "texts"], ["nowhere"], r"evaluation\.texts: unknown text 'nowhere'; "),
        (["calibration", "text"], "nowhere", r"unknown text 'nowhere'"),
        (["evaluation", "suite"], "best", r"unknown evaluation suite 'best'; params\.yaml has paper"),
        (["evaluation", "limit"], -1, r"evaluation\.limit: -1 is"),
        (["suites", "paper", "texts"], ["nowhere"], r"suites\.paper\.texts: unknown text 'nowhere'"),
        (["suites", "small"], {"texts": []}, r"suites\.small: '\w+' is a required property"),
        (["variants", "wild"], {"evaluation": {"suite": "best"}}, r"unknown evaluation suite 'best'"),
        (["refinment"], {}, r"'refinment' was unexpected\); there are seed, .*refinement, post, "),
        (["refinement"], 3, r"refinement: 3 is not of type 'object'; there are epochs, steps, .*, loss"),
        (["models", "mine"], {"path": "a", "hub": "b"}, r"models\.mine: .*; expected: {hub: .*} \| {path: "),
        (["models", "mine"], {"package": "a==1"}, r"models\.mine: .*; expected: .*{package: .*, file: <m"),
        (["models", "mine"], {"package": "a", "file": "b"}, r"mine\.package: .*; expected: <name>==<vers"),
        (["models", "mine"], {}, r"models\.mine: {} does not match; expected: {hub: <id>} \| {path: "),
        (["models", "mine"], "org/name", r"models\.mine: 'org/name' is not .*; expected: {hub: <id>} \| "),
        (["texts", "mine"], {"path": "a", "url": "b"}, r"texts\.mine: .*'url' .*; there are hub, config, "),
        (["models", "no/slash"], {"path": "a"}, r"models: 'no/slash' does not match; expected: a name of"),
        (["variants", "wild"], {"refinement": {"epoch": 1}}, r"variants\.wild\.refinement: .*epoch"),
        (["variants", "wild"], {"models": {}}, r"variants\.wild: .*models"),
        (["variants", "wild"], {"evaluation": {"texts": ["nowhere"]}}, r"unknown text 'nowhere'"),
        (["variants", "with_line"], {}, r"variants: 'with_line' does not .* digits and hyphens"),
        (["runs"], ["smollm2-135m"], r"runs\.0: 'smollm2-135m' .* expected: default, or <model>_r<ratio>\["),
        (["runs"], ["nobody_r0.6"], r"unknown model 'nobody'; params\.yaml has llama2-13b, .*smollm2-135m"),
        (["runs"], ["llama7b_r0.6_none"], r"unknown method or variant 'none'; params\.yaml has .*paper"),
        (["runs"], ["llama7b_r1.5"], r"ratio 1\.5 must lie between 0 and 1"),
        (["methods", "wild"], {"compression": {"allocation": "best"}}, r"wild\.\w+\.allocation: unknown"),
        (["compression", "allocation"], "best", r"unknown allocation 'best'; there are uniform, .*optimal"),
        (["compression", "allocation"], 3, r"compression\.allocation: 3 is not of type 'string'"),
        (["methods", "wild"], {"compression": {"method": "none"}}, r"unknown method 'none'"),
        (["methods", "norefine"], {}, r"norefine is both a method and a variant"),
        (["compression", "method"], "none", r"unknown method 'none'; params\.yaml has .*svd-llm"),
        (["compression", "dobi", "epochs"], 0, r"compression\.dobi\.epochs: 0 is less than the minimum of 1"),
        (["variants", "wild"], {"compression": {"dobi": {"lr": 1}}}, r"wild\.compression\.dobi: .*lr"),
        (["post", "rank"], 0, r"post\.rank: 0 is less than the minimum of 1"),
        (["data_dir"], "/nothere", r"^params\.yaml: data_dir: '/nothere' is no folder; \"\" uses the hub$"),
        (["data_dir"], "~/nothere", r"data_dir: '~/nothere' is no folder"),
        (["seed"], -1, r"seed: -1 is less than the minimum of 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_key(
    config: Config, path: list[str], value: Any, message: str
) -> None:
    place = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message) as raised:
        params.validate(config)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700  # names of all methods and variants among them


@pytest.mark.parametrize(
    ("kind", "source", "key"),
    [
        ("models", {"hub": "a/b", "config": "c"}, "config"),
        ("models", {"hub": "a/b", "file": "c"}, "file"),
        ("models", {"hub": "a/b", "dtype": "float32"}, "dtype"),
        ("models", {"path": "folder", "dtype": "float32"}, "dtype"),
        ("models", {"path": "folder", "sha256": "0" * 64}, "sha256"),
        ("models", {"path": "a.gguf", "revision": "main"}, "revision"),
        ("models", {"package": "a==1", "file": "b.gguf", "revision": "main"}, "revision"),
        ("texts", {"hub": "a/b", "sha256": "0" * 64}, "sha256"),
        ("texts", {"path": "a.txt", "sha256": "0" * 64}, "sha256"),
        ("texts", {"path": "a", "config": "c"}, "config"),
        ("texts", {"package": "a==1", "file": "b.txt", "dtype": "float32"}, "dtype"),
    ],
)
def test_a_key_that_does_nothing_for_a_source_is_refused(
    config: Config, kind: str, source: Config, key: str
) -> None:
    config[kind]["mine"] = source
    place = rf"^params\.yaml: {kind}\.mine\.{key}"
    with pytest.raises(ValueError, match=rf"{place}: does nothing beside (\w+); such a {kind[:-1]} has \1"):
        params.validate(config)
    del source[key]
    params.validate(config)


def test_a_source_may_have_every_key_that_acts_on_it(config: Config) -> None:
    member = {"package": "a==1", "file": "b", "sha256": "0" * 64}
    config["models"] |= {
        "far": {"hub": "a/b", "revision": "main"},
        "file": {"path": "a.gguf", "sha256": "0" * 64, "dtype": "float16"},
        "packed": member | {"dtype": "float32"},
    }
    config["texts"] |= {"far": {"hub": "a/b", "config": "c", "revision": "main"}, "packed": member}
    params.validate(config)


def test_a_line_makes_a_new_objective_or_allocation_known(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["methods"]["new"] = {"compression": {"objective": "mine", "allocation": "fair"}}
    monkeypatch.setitem(methods.OBJECTIVES, "mine", methods.Piece(("shifted",)))
    with pytest.raises(ValueError, match="unknown allocation 'fair'"):
        params.validate(config)
    monkeypatch.setitem(methods.ALLOCATIONS, "fair", methods.Piece(("spectra",)))
    params.validate(config)
    run = params.parse_run(config, "llama7b_r0.6_new_norefine")
    assert (layout.block_stages(run), params.measures(run)) == (["solve", "propagate"], ["spectra"])


def test_a_missing_key_is_named(config: Config) -> None:
    del config["refinement"]["clip"]
    with pytest.raises(ValueError, match="refinement: 'clip' is a required property"):
        params.validate(config)


# --- the default run --------------------------------------------------------------------------------------


def test_the_default_run_takes_model_and_ratio_from_params_and_shares_the_named_runs_artifacts(
    local: Config,
) -> None:
    local["model"], local["compression"]["ratio"] = "mine", 0.5
    assert where(paths(local, "default")) == where(paths(local, "mine_r0.5"))
    local["compression"]["ratio"] = 0.00001234567
    assert where(paths(local, "default")) == where(paths(local, "mine_r0.00001234567"))
    before = where(paths(local, "mine_r0.6"))
    local["compression"]["ratio"] = 0.25
    assert where(paths(local, "mine_r0.6")) == before  # the ratio of other runs is in their names
    assert where(paths(local, "default")) == where(paths(local, "mine_r0.25"))
    params.validate(local)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nobody"}, r"unknown model 'nobody'"),
        (
            {"variants": {"half": {"compression": {"ratio": 0.5}}}},
            r"variants\.half\.compression\.ratio: .*name",
        ),
        (
            {"variants": {"lean": {"calibration": {"keep_activations": False}}}},
            r"variants\.lean\.calibration\.keep_activations: runs share",
        ),
        (
            {"variants": {"lean": {"compression": {"keep_factors": False}}}},
            r"variants\.lean\.compression\.keep_factors: runs share",
        ),
        (
            {"variants": {"lean": {"calibration": {"batch": 1}}}},
            r"variants\.lean\.calibration\.batch: runs share .* only calibration\.batch itself",
        ),
        (
            {"variants": {"lean": {"methods": {"svd": {"evaluation": {"batch": 1}}}}}},
            r"lean\.methods\.svd\.evaluation\.batch: runs share .* only evaluation\.batch itself",
        ),
        ({"runs": ["default_paper"]}, r"runs\.0: 'default_paper' does not match"),
    ],
)
def test_a_mistaken_default_run_is_named(config: Config, change: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params.validate(config | change)


def test_a_data_dir_below_home_is_a_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    params.validate(config | {"data_dir": "~/data"})


def test_variants_have_their_own_batches_in_training(config: Config) -> None:
    own = {"refinement": {"batch": 1}, "post": {"batch": 1}, "compression": {"dobi": {"batch": 2}}}
    params.validate(config | {"variants": config["variants"] | {"lean": own}})


def test_variants_are_found_by_what_they_change(config: Config) -> None:
    sweep = params.variants_of(config, {"calibration": ["sequences"]})
    assert [config["variants"][name]["calibration"]["sequences"] for name in sweep] == [
        16, 32, 64, 128, 256, 512, 1024,
    ]  # fmt: skip
    ablation = params.variants_of(
        config, {"compression": ["objective", "ridge", "allocation"], "refinement": ["epochs"]}
    )
    assert {"norefine", "anchored", "shift-norefine"} <= set(ablation)
    assert not {"paper", "seq16"} & set(ablation)


# --- what is measured -------------------------------------------------------------------------------------


def test_a_suite_names_what_is_measured_and_evaluation_overrides_it(config: Config) -> None:
    quick = params.parse_run(config, "smollm2-135m_r0.6").settings["evaluation"]
    assert quick["tasks"] == ["piqa", "winogrande", "hellaswag"] and quick["limit"] == 64
    config["evaluation"]["suite"] = "paper"
    paper = params.parse_run(config, "smollm2-135m_r0.6").settings["evaluation"]
    assert paper["texts"] == ["wikitext2", "ptb", "c4"]
    assert paper["windows"] == paper["limit"] == 0 and paper["window"] == 2048
    assert sorted(paper["tasks"]) == sorted(
        ["winogrande", "piqa", "arc_easy", "arc_challenge", "openbookqa", "hellaswag", "mathqa"]
    )
    config["evaluation"] |= {"limit": 500, "tasks": ["boolq"]}
    config["variants"]["fast"] = {"evaluation": {"suite": "quick", "windows": 3}}
    run = params.parse_run(config, "smollm2-135m_r0.6_fast").settings["evaluation"]
    assert (run["limit"], run["tasks"], run["windows"]) == (500, ["boolq"], 3)
    assert run["texts"] == ["enwiki100", "lee-news"]


def test_a_task_of_a_suite_has_the_artifact_of_the_same_task_asked_for_alone(local: Config) -> None:
    local["suites"]["mine"] = {"texts": [], "windows": 0, "tasks": ["piqa", "boolq"], "limit": 100}
    local["evaluation"] |= {"texts": None, "tasks": ["piqa"], "windows": None, "limit": 100}
    (alone,) = [name for name in paths(local).measurements() if "accuracy" in name]
    local["evaluation"] |= {"suite": "mine", "tasks": None, "limit": None}
    assert alone in paths(local).measurements()
    assert len(paths(local).measurements()) == 2


# --- runs -------------------------------------------------------------------------------------------------


def test_a_run_has_the_model_ratio_and_merged_settings_of_its_name(config: Config) -> None:
    before = copy.deepcopy(config)
    run = params.parse_run(config, "llama2-7b_r0.8_paper")
    assert (run.name, run.model, run.ratio) == ("llama2-7b_r0.8_paper", "llama2-7b", 0.8)
    assert run.settings["refinement"] == config["refinement"] | config["variants"]["paper"]["refinement"]
    assert run.settings["compression"] == config["compression"] | config["variants"]["paper"]["compression"]
    run.settings["evaluation"]["texts"].append("c4")
    assert config == before  # a run's settings are its own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama7b", "must have the form"),
        ("llama7b_0.6", "must have the form"),
        ("llama7b_r0.6_", "must have the form"),
        ("llama7b_r0.6_svd_refine_norefine", "must have the form"),
        ("llama7b_r0.6_svd_aasvd", "unknown variant 'aasvd'"),
        ("llama7b_r0.6_a_b", "unknown method or variant 'a'"),
        ("llama7b_r0", "ratio 0 must lie"),
        ("llama7b_r0.0", r"ratio 0\.0 must lie"),
        ("llama7b_r1", "ratio 1 must lie"),
        ("llama7b_r1.0", "it is the share kept"),
        ("llama7b_r0.6.1", r"ratio 0\.6\.1 must lie"),
        ("llama7b_r.", r"ratio \. must lie"),
        ("gpt_r0.6", "unknown model 'gpt'; params.yaml has "),
        ("llama7b_r0.6_fast", "unknown method or variant 'fast'; params.yaml has "),
    ],
)
def test_a_malformed_run_is_refused(config: Config, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params.parse_run(config, name)


def test_a_model_name_may_contain_the_mark_of_a_ratio(config: Config) -> None:
    config["models"]["a_r0.5"] = {"path": "a"}
    assert params.parse_run(config, "a_r0.5_r0.7_norefine")[1:3] == ("a_r0.5", 0.7)


def test_ratios_written_in_two_ways_share_their_artifacts(local: Config) -> None:
    assert (
        where(paths(local, "mine_r0.6"))
        == where(paths(local, "mine_r0.60"))
        == where(paths(local, "mine_r.6"))
    )
    assert paths(local, "mine_r0.60").compressed.name.startswith("r0.6-")


# --- comparisons ------------------------------------------------------------------------------------------


def compared(
    config: Config, methods: list[str], variants: list[str], ratios: str = "0.6"
) -> params.Comparison:
    config["comparison"] = {"methods": methods, "variants": variants}
    params.validate(config)
    return params.parse_comparison(config, f"llama7b_r{ratios}")


def test_a_comparison_shows_methods_as_they_are_declared(config: Config) -> None:
    """Published recipes stand beside common refinement, in the runs that anybody asks for by name."""
    found = compared(config, ["aa-svd", "svd", "aasvd"], ["", "norefine", "refine"], "0.8-0.4")
    assert {key: run.name for key, run in found.runs.items() if key[2] == "0.8"} == {
        ("aa-svd", "", "0.8"): "llama7b_r0.8_aa-svd",
        ("aa-svd", "norefine", "0.8"): "llama7b_r0.8_aa-svd_norefine",
        ("aa-svd", "refine", "0.8"): "llama7b_r0.8_aa-svd_refine",
        # Declared without refinement, and with the common one: the same models are not there twice.
        ("svd", "", "0.8"): "llama7b_r0.8_svd",
        ("svd", "refine", "0.8"): "llama7b_r0.8_svd_refine",
        ("aasvd", "", "0.8"): "llama7b_r0.8_aasvd",
        ("aasvd", "norefine", "0.8"): "llama7b_r0.8_aasvd_norefine",
    }
    assert found.ratios == [0.8, 0.4] and len(found.runs) == 14 and not found.left_out
    published = found.runs["aa-svd", "", "0.4"].settings["refinement"]
    assert (published["optimizer"], published["epochs"], published["batch"]) == ("adamw", 25, 32)


def test_the_papers_calibration_stands_beside_the_common_one(config: Config) -> None:
    found = params.parse_comparison(config, "as-published/llama7b_r0.8-0.6-0.4")
    settings = {key[:2]: run.settings for key, run in found.runs.items()}
    compared = config["comparisons"]["as-published"]["methods"]
    assert set(settings) == {(method, variant) for method in compared for variant in ("", "as-published")}
    # All but our own, and those that take hours; `drone` is `svd-llm-w`.
    assert set(config["methods"]) - set(compared) == {"aasvd", "asvd-strs", "drone", "dobi-svd-trained"}
    common = {"text": "wikitext2", "sequences": 256, "tokens": 2048, "gradients": 0}
    presets: dict[str, Config] = {
        "svd-llm": {"post": {"batch": 8}},
        "wanda-sp": {"calibration": {"text": "c4", "sequences": 128}},
        "blockpruner": {"calibration": {"text": "alpaca", "sequences": 16}, "compression": {"probe": 16}},
    }
    for method in compared:
        own, published = settings[method, ""], settings[method, "as-published"]
        expected = params.merged(own, {"calibration": common, "compression": {"probe": 32}})
        assert published == params.merged(expected, presets.get(method, {}))


def test_a_variant_holds_settings_of_single_methods(config: Config) -> None:
    """Laid over its other settings, and only where that method is run, whoever names it."""
    config["variants"]["mine"] = {
        "refinement": {"epochs": 3},
        "methods": {"svd": {"refinement": {"epochs": 5}, "seed": 7}},
    }
    params.validate(config)

    def chosen(name: str) -> tuple[int, int]:
        settings = params.parse_run(config, f"llama7b_r0.6_{name}").settings
        assert "methods" not in settings
        return settings["refinement"]["epochs"], settings["seed"]

    assert (chosen("svd_mine"), chosen("asvd_mine"), chosen("mine")) == ((5, 7), (3, 0), (3, 0))
    assert chosen("mine_norefine") == (0, 0)
    config["compression"]["method"] = "svd"
    assert (chosen("mine"), chosen("mine_norefine")) == ((5, 7), (0, 7))
    own = config["variants"]["mine"]["methods"]
    for mistake, message in [
        ({"best": {}}, r"unknown method 'best'; params\.yaml has .*svd-llm"),
        ({"svd": {"compression": {"ratio": 0.5}}}, r"variants\.mine\.methods\.svd\.compression\.ratio: "),
        ({"svd": {"calibration": {"keep_activations": False}}}, r"methods\.svd\.calibration\.keep_acti"),
        ({"svd": {"calibration": {"text": "nowhere"}}}, r"unknown text 'nowhere'"),
        ({"svd": {"compression": {"objective": ""}}}, r"mine\.methods\.svd\.compression\.objective: unknown"),
        ({"svd": {"methods": {}}}, r"variants\.mine\.methods\.svd: .*'methods' was unexpected"),
    ]:
        config["variants"]["mine"]["methods"] = own | mistake
        with pytest.raises(ValueError, match=message):
            params.validate(config)
    config["variants"]["mine"]["methods"] = own
    config["methods"]["svd"]["methods"] = {}
    with pytest.raises(ValueError, match=r"methods\.svd: .*'methods' was unexpected"):
        params.validate(config)


def test_the_papers_eight_bit_method_has_their_ranks(config: Config) -> None:
    """AA-SVD^q: input-aware, the paper's refinement, ⌊r min(m, n)⌋ directions of every linear."""
    run = params.parse_run(config, "llama7b_r0.6_aa-svd-q").settings
    unquantized = params.parse_run(config, "llama7b_r0.6_aa-svd-input-aware").settings
    assert run["refinement"] == unquantized["refinement"]
    assert run["compression"] == unquantized["compression"] | {"method": "aa-svd-q", "storage": "remapped"}
    assert uniform_rank(4096, 11008, parameter_ratio=0.6, storage=run["compression"]["storage"]) == 2457


def test_the_shipped_comparison_shows_every_method_with_and_without_refinement(config: Config) -> None:
    found = params.parse_comparison(config, "smollm2-135m_r0.6")
    for method in config["comparison"]["methods"]:
        refined = {
            bool(run.settings["refinement"]["epochs"]) for key, run in found.runs.items() if key[0] == method
        }
        assert refined == {True, False}
    own = [(key[0], run.settings) for key, run in found.runs.items()]
    assert all(a != b for a, b in itertools.combinations(own, 2))


def test_what_does_not_go_together_is_left_out_of_a_comparison(config: Config) -> None:
    found = compared(config, ["svd", "wanda-sp"], ["", "optimal"])
    assert {key[:2] for key in found.runs} == {("svd", ""), ("svd", "optimal"), ("wanda-sp", "")}
    assert set(found.left_out) == {("wanda-sp", "optimal")}
    assert "wanda_sp does not go with compression.allocation optimal" in found.left_out["wanda-sp", "optimal"]
    with pytest.raises(ValueError, match=r"'llama7b_r0\.6' has no run: .*wanda_sp does not go with"):
        compared(config, ["wanda-sp"], ["optimal"])


def test_what_nothing_reads_makes_no_row_and_no_ratio_counts_twice(config: Config) -> None:
    config["variants"]["idle"] = {"compression": {"blend": 0.3, "probe": 9}, "refinement": {"clip": 2.0}}
    config["comparison"] = {"methods": ["svd", "saes-svd", "aa-svd"], "variants": ["", "idle"]}
    found = params.parse_comparison(config, "llama7b_r0.6-0.60-.6-0.4")
    assert found.ratios == [0.6, 0.4]
    assert {key for key in found.runs if key[1]} == {("aa-svd", "idle", "0.6"), ("aa-svd", "idle", "0.4")}
    assert len(found.runs) == 8
    with pytest.raises(ValueError, match=r"run 'llama7b_r0\.5\._svd': ratio 0\.5\. must lie between 0 and 1"):
        params.parse_comparison(config, "llama7b_r0.6-0.5.")


def test_a_missing_file_of_ranks_concerns_the_runs_that_read_it(config: Config) -> None:
    config["variants"]["given"] = {"compression": {"allocation": "file"}}
    assert len(compared(config, ["svd", "asvd"], [""]).runs) == 2
    assert any(run.name.endswith("_given") for run in params.runs_of(config, "llama7b", "r0.6"))
    for parse in (
        lambda: params.parse_run(config, "llama7b_r0.6_svd_given"),
        lambda: compared(config, ["svd"], ["", "given"]),
    ):
        with pytest.raises(
            ValueError, match=r"run 'llama7b_r0\.6_svd_given': compression\.ranks_file '' is no file"
        ):
            parse()


def test_rows_of_a_comparison_are_measured_alike(config: Config) -> None:
    """A hundred short measurements and the default ones would share a dense row that is true of one."""
    with pytest.raises(
        ValueError, match=r"'llama7b_r0\.6_svd' and '.*_svd_norefine-short' differ in eval.*windows"
    ):
        compared(config, ["svd", "asvd"], ["", "norefine-short"])
    config["methods"]["mine"] = {"evaluation": {"limit": 16}}
    with pytest.raises(
        ValueError, match=r"'.*_svd' and 'llama7b_r0\.6_mine' differ in evaluation\.limit, but"
    ):
        compared(config, ["svd", "mine"], [""])
    config["variants"]["exact"] = {"calibration": {"dtype": "float32"}}
    with pytest.raises(ValueError, match=r"differ in calibration\.dtype, but"):
        compared(config, ["svd"], ["", "exact"])
    config["variants"]["norefine-short"] = {"refinement": {"epochs": 0}}
    assert len(compared(config, ["svd", "aasvd"], ["", "norefine-short"]).runs) == 3


def test_one_comparison_shows_every_rule_of_allocation(config: Config) -> None:
    """At one objective, storage and budget, unrefined: all that differs is the ranks."""
    found = params.parse_comparison(config, "allocations/smollm2-135m_r0.6")
    rules = [run.settings["compression"]["allocation"] for run in found.runs.values()]
    # Ranks from a file are not a rule, whole parts go with no objective, and trained positions take hours.
    others = {"file", "dobi", *methods.REMOVING}
    assert set(rules) == set(methods.ALLOCATIONS) - others and len(rules) == len(set(rules))
    for run in found.runs.values():
        run.settings["compression"]["allocation"] = ""
    first, *more = [run.settings for run in found.runs.values()]
    assert all(settings == first for settings in more)
    assert first["compression"]["objective"] == "input_aware" and first["compression"]["storage"] == "factors"
    assert first["refinement"]["epochs"] == 0
    # They do not make the ablation of the paper longer.
    ablation = {"compression": ["objective", "blend", "ridge", "allocation"], "refinement": ["epochs"]}
    assert not [name for name in params.variants_of(config, ablation) if name.startswith("alloc-")]
    with pytest.raises(
        ValueError, match=r"unknown comparison 'ranks'; params\.yaml has allocations, as-published, official"
    ):
        params.parse_comparison(config, "ranks/smollm2-135m_r0.6")


@pytest.mark.parametrize(
    "name", ["llama7b_r0.8-abc", "llama7b_r0.8-", "llama7b_r", "llama7b", "_r0.8", "a/b/llama7b_r0.8"]
)
def test_a_malformed_comparison_is_refused(config: Config, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"must have the form \[<table>/\]<model>_r<ratio>\[-<ratio>\.\.\.\]"
    ):
        params.parse_comparison(config, name)


@pytest.mark.parametrize("variant", ["paper", "anchored", "agnostic-norefine"])
def test_a_variant_that_makes_one_of_all_methods_is_refused(config: Config, variant: str) -> None:
    with pytest.raises(ValueError, match=rf"variant '{variant}' sets compression\.objective, "):
        compared(config, ["svd", "asvd"], ["norefine", variant])


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("methods", "", "unknown method ''"),
        ("methods", "norefine", "unknown method 'norefine'"),
        ("variants", "svd", "unknown variant 'svd'"),
    ],
)
def test_a_comparison_names_what_there_is(config: Config, kind: str, name: str, message: str) -> None:
    shipped = config["comparison"]
    config["comparison"] = {**shipped, kind: [name]}
    with pytest.raises(ValueError, match=rf"params\.yaml: comparison\.{kind}: {message}"):
        params.validate(config)
    config["comparison"], config["comparisons"]["mine"] = shipped, {**shipped, kind: [name]}
    with pytest.raises(ValueError, match=rf"params\.yaml: comparisons\.mine\.{kind}: {message}"):
        params.validate(config)


@pytest.mark.parametrize("kind", ["methods", "variants", "models"])
def test_a_name_that_yaml_reads_as_no_string_is_refused(config: Config, kind: str) -> None:
    """`off` is False in YAML 1.1, and 3 a number."""
    for name in (False, 3):
        changed = {**config, kind: {**config[kind], name: {}}}
        with pytest.raises(
            ValueError, match=rf"{kind}: {name} is not of type 'string'; expected: a name of .*in quotes"
        ):
            params.validate(changed)


def test_a_method_is_composed_of_overrides(config: Config) -> None:
    run = params.parse_run(config, "llama7b_r0.6_saes-svd")
    own = {"objective": "saes", "allocation": "uniform", "storage": "factors"}
    assert run.settings["compression"] == config["compression"] | {"method": "saes-svd"} | own
    assert run.settings["refinement"]["epochs"] == 0
    refined = params.parse_run(config, "llama7b_r0.6_saes-svd_refine")
    assert refined.settings["compression"] == run.settings["compression"]
    assert refined.settings["refinement"]["epochs"] == config["variants"]["refine"]["refinement"]["epochs"]
    # A method may also be the default, or a variant's.
    config["variants"]["mine"] = {"compression": {"method": "saes-svd", "ridge": 0.5}}
    expected = run.settings["compression"] | {"ridge": 0.5}
    assert params.parse_run(config, "llama7b_r0.6_mine").settings["compression"] == expected
    config["compression"]["method"] = "saes-svd"
    assert params.parse_run(config, "llama7b_r0.6").settings == run.settings


def test_every_shipped_method_makes_a_run(config: Config) -> None:
    for method in config["methods"]:
        for variant in ("", *(f"_{name}" for name in config["variants"])):
            name = f"llama7b_r0.6_{method}{variant}"
            pruned = config["methods"][method].get("compression", {}).get("storage") == "pruned"
            if pruned and "compression" in config["variants"].get(variant[1:], {}):
                continue  # another objective, allocation or storage is another method
            run = params.parse_run(config, name)
            assert run.settings["compression"]["method"] == method
            assert layout.block_stages(run)[0] == "solve"


def test_values_inside_a_mapping_on_the_command_line_are_read_as_yaml(local: Config) -> None:
    """Snakemake gives `--config 'evaluation={limit: 500}'` as strings."""
    given = {"limit": "500", "windows": "null", "suite": "paper", "tasks": ["piqa"]}
    local["evaluation"] |= given
    local["calibration"]["keep_activations"] = "false"
    local["refinement"]["learning_rate"] = "many"
    local["model"] = "123"
    params.read_strings(local)
    assert local["evaluation"]["limit"] == 500 and local["evaluation"]["windows"] is None
    assert local["evaluation"]["suite"] == "paper" and local["evaluation"]["tasks"] == ["piqa"]
    assert local["calibration"]["keep_activations"] is False
    assert local["refinement"]["learning_rate"] == "many"  # for `validate` to refuse
    assert local["model"] == "123"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evaluation": "{suite: paper"}, r"evaluation: '\{suite: paper' is not of type 'object'"),
        (
            {"evaluation": {"limit": "1: 2: 3"}},
            r"evaluation\.limit: '1: 2: 3' is not of type 'integer', 'null'",
        ),
        ({"calibration": {"tokens": "2024-13-45"}}, r"calibration\.tokens: '2024-13-45' is not of type"),
    ],
)
def test_a_value_on_the_command_line_that_is_not_yaml_is_named(
    local: Config, given: Config, message: str
) -> None:
    config = params.merged(local, given)
    params.read_strings(config)
    with pytest.raises(ValueError, match=message):
        params.validate(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0\nmodels: {mine: {path: a}\nruns: []\n", r"params\.yaml, line 3: not YAML: expected"),
        ("seed: 0\n\truns: []\n", r"params\.yaml, line 2: not YAML: found character"),
        ("seed: \x00", r"params\.yaml: not YAML: .*special characters"),
        ("seed: 2024-13-45", r"params\.yaml: not YAML: month must be in"),
    ],
)
def test_a_file_that_is_not_yaml_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        params.load(tmp_path / "params.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("2E+1", 20.0), ("+5.e-3", 5e-3), (".5e1", 5.0), ("3.0e-4", 3e-4)]
)
def test_a_number_with_an_exponent_needs_no_point(
    local: Config, tmp_path: Path, text: str, number: float
) -> None:
    """PyYAML takes some of these for strings, but 3.0e-4 not."""
    local["variants"]["wild"] = {"refinement": {"learning_rate": number}}
    local["refinement"]["learning_rate"] = number
    written = yaml.safe_dump(local)
    assert written.count(f"learning_rate: {number}\n") >= 2
    (tmp_path / "params.yaml").write_text(
        written.replace(f"learning_rate: {number}\n", f"learning_rate: {text}\n")
    )
    found = params.load(tmp_path / "params.yaml")
    params.validate(found)
    assert where(paths(found, "mine_r0.6_wild")) == where(paths(local, "mine_r0.6_wild"))
    assert found["refinement"]["learning_rate"] == number


def test_an_integer_is_not_written_with_an_exponent(local: Config) -> None:
    local["calibration"]["sequences"] = "1e2"
    params.read_strings(local)
    with pytest.raises(ValueError, match=r"calibration\.sequences: '1e2' is not of type 'integer'"):
        params.validate(local)


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ({"storage": "pruned"}, r"objective loss_aware does not go with compression\.storage pruned"),
        ({"objective": "wanda_sp"}, r"objective wanda_sp does not go with compression\.storage pivoted"),
        ({"allocation": "shortgpt"}, r"loss_aware does not go with compression\.allocation shortgpt"),
        (
            {"objective": "wanda_sp", "storage": "pruned", "allocation": "optimal"},
            r"wanda_sp does not go with compression\.allocation optimal",
        ),
        (
            {"objective": "unchanged", "storage": "pruned", "allocation": "uniform"},
            r"unchanged does not go with compression\.allocation uniform",
        ),
        (
            {"objective": "wanda_sp", "storage": "pruned", "allocation": "uniform", "precision": "int8"},
            r"int8 is for low-rank matrices",
        ),
    ],
)
def test_pruning_goes_with_what_is_stored_as_pruned(
    config: Config, compression: dict[str, str], message: str
) -> None:
    config["variants"]["odd"] = {"compression": compression}
    with pytest.raises(ValueError, match=message):
        params.parse_run(config, "llama7b_r0.6_odd")


def test_remapped_is_eight_bits_already(config: Config) -> None:
    config["variants"]["both"] = {"compression": {"storage": "remapped", "precision": "int8"}}
    with pytest.raises(ValueError, match=r"int8 does not go with .*remapped"):
        params.parse_run(config, f"{min(config['models'])}_r0.6_both")


def test_pruning_methods_are_those_that_need_no_search(config: Config) -> None:
    assert params.pruning_methods(config) == ["shortgpt", "wanda-sp"]
    config["methods"]["mine"] = {"compression": {"storage": "pruned", "allocation": "uniform"}}
    assert "mine" in params.pruning_methods(config)
