import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from architectures import TINY, UNUSUAL, linears, tiny_model
from safetensors.torch import load_file
from stored import TOKENS, assert_updated, describe, random_tokens
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from workflow_copy import trained_tokenizer

from aasvd import blocks, calibration, checkpoint, evaluate, provenance, sources, stages
from aasvd.artifacts import (
    Activations,
    DamagedArtifactError,
    read_json,
    read_table,
    read_tensors,
    verify,
    write_table,
)
from aasvd.device import compute_dtype
from aasvd.layout import failure_file
from aasvd.stages import compression, evaluation, originals, publication, ranks, stage

CPU = torch.device("cpu")
CALIBRATION: dict[str, Any] = {"dtype": "float32", "batch": 2}
COMPRESSION: dict[str, Any] = {
    "objective": "anchored",
    "blend": 0.5,
    "ridge": 0.0,
    "allocation": "uniform",
    "ranks_file": "",
}
REFINEMENT: dict[str, Any] = {
    "epochs": 1,
    "steps": 0,
    "batch": 2,
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "clip": 1.0,
    "shuffle": True,
    "loss": "mse",
}


class Chain:
    """All stages between a model's folder and its checkpoint, with files named as the rules name them."""

    def __init__(self, folder: Path, dense: Path, storage: str) -> None:
        self.folder, self.dense, self.storage = folder, dense, storage
        self.log = str(folder / "log")

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def original(self) -> int:
        """Run the original side and return the number of blocks."""
        stages.fetch_model(
            source={"path": str(self.dense)},
            output=self.path("source.json"),
            outline=self.path("outline.json"),
            record=self.path("fetch.json"),
            cache=self.path("cache"),
            log=self.log,
        )
        calibration.write_tokens(Path(self.path("tokens.parquet")), random_tokens(3))
        stages.embed(
            source=self.path("source.json"),
            tokens=self.path("tokens.parquet"),
            output=self.path("x0"),
            record=self.path("embed.json"),
            settings=CALIBRATION,
            log=self.log,
        )
        count = json.loads(Path(self.path("outline.json")).read_text())["blocks"]
        assert isinstance(count, int)
        stages.allocate(
            outline=self.path("outline.json"),
            measured={},
            positions=None,
            output=self.path("ranks.json"),
            record=self.path("allocate.json"),
            parameter_ratio=0.6,
            compression={**COMPRESSION, "storage": self.storage},
            log=self.log,
        )
        for block in range(count):
            stages.capture_block(
                source=self.path("source.json"),
                inputs=self.path(f"x{block}"),
                outputs=self.path(f"x{block + 1}"),
                covariances=self.path(f"c{block}"),
                record=self.path(f"capture{block}.json"),
                index=block,
                settings=CALIBRATION,
                log=self.log,
            )
        return count

    def solve(self, block: int, **changed: Any) -> None:
        arguments: dict[str, Any] = {
            "source": self.path("source.json"),
            "covariances": self.path(f"c{block}"),
            "original": self.path(f"x{block}"),
            "shifted": self.path(f"s{block}" if block else "x0"),
            "ranks": self.path("ranks.json"),
            "gradients": None,
            "fisher": None,
            "buckets": None,
            "output": self.path(f"solved{block}"),
            "record": self.path(f"solve{block}.json"),
            "index": block,
            "calibration": CALIBRATION,
            "compression": {**COMPRESSION, "storage": self.storage},
            "log": self.log,
        }
        stages.solve_block(**(arguments | changed))

    def refine(self, block: int, output: str = "refined", **changed: Any) -> None:
        stages.refine_block(
            source=self.path("source.json"),
            shifted=self.path(f"s{block}" if block else "x0"),
            target=self.path(f"x{block + 1}"),
            solved=self.path(f"solved{block}"),
            output=self.path(f"{output}{block}"),
            record=self.path(f"refine{block}.json"),
            index=block,
            seed=0,
            calibration=CALIBRATION,
            refinement=REFINEMENT | changed,
            log=self.log,
        )

    def propagate(self, block: int) -> None:
        stages.propagate(
            source=self.path("source.json"),
            shifted=self.path(f"s{block}" if block else "x0"),
            target=self.path(f"x{block + 1}"),
            factors=self.path(f"refined{block}"),
            output=self.path(f"s{block + 1}"),
            record=self.path(f"propagate{block}.json"),
            index=block,
            calibration=CALIBRATION,
            log=self.log,
        )

    def assemble(self, blocks: int, *, storage: str = "", precision: str = "model") -> Path:
        stages.assemble(
            source=self.path("source.json"),
            outline=self.path("outline.json"),
            factors=[self.path(f"refined{block}") for block in range(blocks)],
            checksums=self.path("model/SHA256SUMS"),
            record=self.path("assemble.json"),
            storage=storage or self.storage,
            precision=precision,
            details={},
            log=self.log,
        )
        return self.folder / "model"


@pytest.fixture
def chain(tmp_path: Path) -> Callable[..., Chain]:
    def make(name: str, storage: str = "factors") -> Chain:
        tiny_model(name).save_pretrained(tmp_path / "dense")
        return Chain(tmp_path / "made", tmp_path / "dense", storage)

    return make


@pytest.mark.parametrize(
    ("name", "storage"),
    [*((name, "factors") for name in (*TINY, *UNUSUAL)), ("llama", "pivoted"), ("opt", "pivoted")],
)
def test_stages_end_to_end(chain: Callable[..., Chain], name: str, storage: str) -> None:
    """The loaded checkpoint computes what the last shifted activations say, on every architecture."""
    run = chain(name, storage)
    blocks = run.original()
    for block in range(blocks):
        run.solve(block)
        run.refine(block)
        run.propagate(block)
    model = AutoModelForCausalLM.from_pretrained(run.assemble(blocks), dtype=torch.float32)
    reached: list[torch.Tensor] = []
    prefix = json.loads(Path(run.path("outline.json")).read_text())["path"]
    last = model.get_submodule(f"{prefix}.{blocks - 1}")
    handle = last.register_forward_hook(
        lambda module, inputs, output: reached.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(random_tokens(3), use_cache=False)
    handle.remove()
    expected = read_tensors(Path(run.path(f"s{blocks}")), device=CPU)["activations"]
    assert expected.shape == (3, TOKENS, 32)
    # The same float32 operations in batches of another size: some hundred eps of the largest value.
    torch.testing.assert_close(reached[0], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not (run.folder / ".packed").exists()
    linears = json.loads(Path(run.path("outline.json")).read_text())["linears"]
    stored = checkpoint.counts(run.folder / "model", list(linears))["linears"]
    ratio = stored / sum(rows * columns for rows, columns in linears.values())
    # The largest rank that keeps the ratio: on matrices of 32 x 32, up to one direction of 64 numbers less.
    assert 0.6 - 64 / 1024 < ratio <= 0.6
    for block in range(blocks):
        before = json.loads(Path(run.path(f"refine{block}.json")).read_text())["before"]
        after = json.loads(Path(run.path(f"propagate{block}.json")).read_text())["after"]
        assert 0 < after["mse"] <= before["mse"]


@pytest.mark.parametrize("objective", ["input_aware", "asvd", "dipsvd_code"])
def test_objectives_on_original_inputs_read_no_activations(
    chain: Callable[[str], Chain], objective: str
) -> None:
    run = chain("llama")
    blocks = run.original()
    for number in range(blocks + 1):
        Path(run.path(f"x{number}")).unlink()
    for block in range(blocks):
        stages.solve_block(
            source=run.path("source.json"),
            covariances=run.path(f"c{block}"),
            ranks=run.path("ranks.json"),
            original=None,
            shifted=None,
            gradients=None,
            fisher=None,
            buckets=None,
            output=run.path(f"solved{block}"),
            record=run.path(f"solve{block}.json"),
            index=block,
            calibration=CALIBRATION,
            compression={**COMPRESSION, "objective": objective},
            log=run.log,
        )
        assert len(load_file(run.path(f"solved{block}"))) == 2 * 7


@pytest.mark.parametrize(("buckets", "made", "warned"), [(2, 2, False), (3, 3, True), (32, 3, True)])
def test_buckets_of_one_sequence_are_reported(
    chain: Callable[..., Chain], buckets: int, made: int, warned: bool
) -> None:
    """Averages of one sequence are the sequence: AdaSVD would be SVD-LLM (W) without a word."""
    run = chain("llama")
    run.original()
    stages.average_block(
        source=run.path("source.json"),
        inputs=run.path("x0"),
        output=run.path("buckets"),
        record=run.path("average.json"),
        index=0,
        buckets=buckets,
        seed=0,
        settings=CALIBRATION,
        log=run.log,
    )
    assert read_json(Path(run.path("average.json")))["buckets"] == made
    assert ("each is a bucket of its own" in Path(run.log).read_text()) == warned
    averaged, whole = (read_tensors(Path(run.path(name)), device=CPU) for name in ("buckets", "c0"))
    name = "gram:mlp.down_proj"
    # The same passes, one sequence at a time.
    same = torch.allclose(averaged[name], whole[name], rtol=1e-4, atol=1e-4 * float(whole[name].abs().max()))
    assert same == warned


def test_asvd_tries_every_linear_alone_at_six_ratios(chain: Callable[..., Chain]) -> None:
    """Against a plain implementation on the whole model: scale by (mean |x|)^0.5, truncate, scale back."""
    run = chain("llama")
    files = []
    for block in range(run.original()):
        files.append(run.path(f"sensitivity{block}"))
        stages.measure_block(
            source=run.path("source.json"),
            covariances=run.path(f"c{block}"),
            gradients=None,
            fisher=None,
            tokens=run.path("tokens.parquet"),
            inputs=run.path(f"x{block}"),
            outputs=None,
            upstream=None,
            output=files[-1],
            record=run.path(f"sensitivity{block}.json"),
            index=block,
            measure="sensitivity-2",
            settings=CALIBRATION,
            log=run.log,
        )
    model, ids = tiny_model("llama"), random_tokens(3)
    inputs: dict[str, torch.Tensor] = {}
    for name, linear in linears(model).items():
        linear.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    with torch.no_grad():
        model(ids)
        scales = {name: x.double().abs().mean((0, 1)).sqrt() for name, x in inputs.items()}
        for name, linear in linears(model).items():
            _, _, block, inner = name.split(".", 3)
            found = read_tensors(Path(files[int(block)]), device=CPU)[inner]
            dense, (m, n) = linear.weight.data, linear.weight.shape
            u, s, v = torch.linalg.svd(dense.double() * scales[name], full_matrices=False)
            for value, ratio in zip(found, (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), strict=True):
                rank = int(ratio * m * n / (m + n) + 1e-9)
                linear.weight.data = ((u[:, :rank] * s[:rank]) @ v[:rank] / scales[name]).float()
                logits = model(ids[:2]).logits[:, :-1].flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, ids[:2, 1:].flatten())
                assert float(value) == pytest.approx(float(loss.exp()), rel=1e-4)
            linear.weight.data = dense
    stages.allocate(
        outline=run.path("outline.json"),
        measured={"sensitivity-2": files},
        positions=None,
        output=run.path("ranks.json"),
        record=run.path("allocate.json"),
        parameter_ratio=0.7,
        compression={**COMPRESSION, "allocation": "strs", "storage": "factors", "probe": 2},
        log=run.log,
    )
    described = read_json(Path(run.path("allocate.json")))
    # One direction of a linear of 32 x 48 is 0.5 % of the tiny model's linears.
    assert 0.7 - 0.005 < described["achieved"] <= 0.7
    assert len({*read_json(Path(run.path("ranks.json")))["ranks"].values()}) > 3


@pytest.mark.parametrize(
    ("storage", "precision", "allowed"),
    [
        ("factors", "int8", 0.15),
        ("pivoted", "int8", 0.25),
        ("remapped", "model", 0.2),
        ("pivoted", "bfloat16", 0.05),
    ],
)
def test_rounded_formats_stay_close(
    chain: Callable[..., Chain], storage: str, precision: str, allowed: float
) -> None:
    """Rounding comes after refinement: the logits stay near those of the unrounded checkpoint."""
    run = chain("llama", storage)
    blocks = run.original()
    for block in range(blocks):
        run.solve(block)
        run.refine(block)
        run.propagate(block)
    expected = AutoModelForCausalLM.from_pretrained(
        run.assemble(blocks, storage="factors"), dtype=torch.float32
    )
    found = AutoModelForCausalLM.from_pretrained(
        run.assemble(blocks, precision=precision), dtype=torch.float32
    )
    stored = json.loads((run.folder / "model" / "config.json").read_text())
    assert stored["dtype"] == ("bfloat16" if precision == "bfloat16" else "float32")
    assert stored["quantization_config"]["storage"] == storage + ("-int8" if precision == "int8" else "")
    with torch.no_grad():
        exact, logits = expected(random_tokens(3)).logits, found(random_tokens(3)).logits
    assert 0 < ((logits - exact).norm() / exact.norm()).item() < allowed


def test_refinement_that_makes_a_block_worse_is_not_kept(chain: Callable[..., Chain]) -> None:
    run = chain("llama")
    run.original()
    run.solve(0)
    run.refine(0, learning_rate=10.0)
    record = json.loads(Path(run.path("refine0.json")).read_text())
    assert record["refined"]["mse"] > record["before"]["mse"] and record["kept"] == "solved"
    solved, kept = load_file(run.path("solved0")), load_file(run.path("refined0"))
    assert solved.keys() < kept.keys()
    assert all(torch.equal(solved[name], kept[name]) for name in solved)
    assert "solved factors stay" in Path(run.path("log")).read_text()


def test_what_decides_on_refinement_does_not_depend_on_the_batch(
    chain: Callable[..., Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is in no key, so results may not tell it."""
    monkeypatch.setattr(compression, "_MEASURED", 2)
    run = chain("llama")
    run.original()
    run.solve(0)
    found = []
    for batch in (1, 2, 3):
        monkeypatch.setitem(CALIBRATION, "batch", batch)
        run.refine(0)
        found.append(read_json(Path(run.path("refine0.json"))))
    for record in found:
        assert record["before"] == pytest.approx({**found[0]["before"], "sequences": 2}, rel=1e-4)
        assert record["refined"] == pytest.approx(found[0]["refined"], rel=1e-4)
    run.propagate(0)
    assert read_json(Path(run.path("propagate0.json")))["after"]["mse"] != found[0]["refined"]["mse"]


def test_a_stage_repeated_gives_the_same_bytes_and_records_itself(chain: Callable[..., Chain]) -> None:
    run = chain("llama")
    run.original()
    run.solve(0)
    run.refine(0)
    torch.manual_seed(123)  # the global generator is not used
    torch.rand(7)
    run.refine(0, output="again")
    assert Path(run.path("refined0")).read_bytes() == Path(run.path("again0")).read_bytes()
    verify(Path(run.path("refine0.json")))
    record = json.loads(Path(run.path("refine0.json")).read_text())
    assert record["stage"] == "refine block 0"
    assert record["seconds"] > 0
    assert 10 < record["peak_memory_mb"] < 100_000
    assert 0 <= record["added_memory_mb"] < record["peak_memory_mb"]
    assert record["device"] == "cpu"
    assert record["code"] == provenance.code_digest()
    assert {"python", "torch", "transformers", "aasvd"} <= set(record["versions"])
    assert len(record["losses"]) == REFINEMENT["epochs"]
    assert "refine block 0: done" in Path(run.log).read_text()


def test_an_assembled_checkpoint_is_made_again_over_its_remains(chain: Callable[..., Chain]) -> None:
    run = chain("llama")
    blocks = run.original()
    for block in range(blocks):
        run.solve(block)
        run.refine(block)
        run.propagate(block)
    folder = run.assemble(blocks)
    first = load_file(folder / "model.safetensors")
    (folder / "SHA256SUMS").unlink()  # as Snakemake does before it runs a job again
    run.assemble(blocks)
    assert (folder / "SHA256SUMS").exists()
    second = load_file(folder / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_post_step_adds_to_the_factors_as_they_are_stored(chain: Callable[..., Chain], dtype: str) -> None:
    """Whatever type the passes compute in: what a float32 checkpoint gains has the rank of the update."""
    run = chain("llama")
    PreTrainedTokenizerFast(tokenizer_object=trained_tokenizer(["some words"])).save_pretrained(run.dense)
    count = run.original()
    for block in range(count):
        run.solve(block)
        run.refine(block)
        run.propagate(block)
    run.assemble(count)
    stages.adapt_model(
        source=run.path("source.json"),
        tokens=run.path("tokens.parquet"),
        checksums=run.path("model/SHA256SUMS"),
        adapted=run.path("adapted/SHA256SUMS"),
        record=run.path("adapt.json"),
        details={},
        seed=0,
        calibration_settings={**CALIBRATION, "dtype": dtype},
        post={"epochs": 1, "rank": 2, "alpha": 4.0, "batch": 2, "learning_rate": 1e-2},
        log=run.log,
    )
    assert read_json(Path(run.path("adapt.json")))["losses"].keys() == {"u", "v"}
    before, after = (load_file(run.path(f"{name}/model.safetensors")) for name in ("model", "adapted"))
    assert_updated(before, after, rank=2, least=1e-3)


def test_a_damaged_input_names_stage_file_and_command(chain: Callable[..., Chain]) -> None:
    run = chain("llama")
    run.original()
    file = Path(run.path("c0"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(stages.StageError) as raised:
        run.solve(0)
    assert isinstance(raised.value.__cause__, DamagedArtifactError)
    assert str(raised.value).startswith(f"solve block 0: {file} is damaged")
    assert f"--force {file}" in str(raised.value)
    assert "Traceback" in Path(run.log).read_text()
    assert not Path(run.path("solve0.json")).exists()


@pytest.mark.parametrize(
    ("where", "cause"), [("weight", "the model's own mlp.up_proj.weight"), ("input", "the input of")]
)
def test_numbers_that_are_not_finite_name_layer_and_stage(tmp_path: Path, where: str, cause: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        if where == "weight":
            model.model.layers[0].mlp.up_proj.weight[1, 2] = torch.nan
        else:
            model.model.embed_tokens.weight[:] = torch.inf
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(stages.StageError, match=rf"capture block 0: .*not finite: {cause}"):
        Chain(tmp_path / "made", tmp_path / "dense", "factors").original()


def test_running_out_of_memory_says_which_setting_lowers_it(tmp_path: Path) -> None:
    with (
        pytest.raises(
            stages.StageError, match=r"embed: the device ran out of memory; lower calibration\.batch"
        ),
        stage.stage("embed", log=tmp_path / "log", record=tmp_path / "record", advice=stage.PASSES),
    ):
        raise torch.OutOfMemoryError
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize(
    ("function", "module", "others"),
    [
        ("differentiate_head", originals, ["tokens", "hidden", "gradient"]),
        ("differentiate_block", originals, ["inputs", "upstream", "gradient", "statistics"]),
        ("differentiate_weights", originals, ["inputs", "upstream", "output"]),
        ("average_block", originals, ["inputs", "output", "buckets", "seed"]),
        (
            "measure_block",
            ranks,
            ["covariances", "gradients", "fisher", "tokens", "outputs", "upstream", "output"],
        ),
    ],
)
def test_stages_of_one_sequence_at_a_time_name_what_helps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, module: Any, others: list[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "Activations", full)
    arguments: dict[str, Any] = {
        **dict.fromkeys(others, "x"), "source": "x", "settings": CALIBRATION,
        "log": str(tmp_path / "log"), "record": str(tmp_path / "record"),
        **({} if function == "differentiate_head" else {"index": 0}),
        **({"measure": "profile", "inputs": "x"} if function == "measure_block" else {}),
    }  # fmt: skip
    with pytest.raises(stages.StageError, match=r"out of memory; set fewer calibration\.tokens"):
        getattr(stages, function)(**arguments)


def test_a_mistake_in_the_code_keeps_its_type(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError),
        stage.stage("embed", log=tmp_path / "log", record=None, advice=""),
    ):
        raise KeyError("x")
    assert "embed failed" in (tmp_path / "log").read_text()


def test_stages_never_run_together_and_keep_their_logs_apart(tmp_path: Path) -> None:
    running: list[int] = []
    together: list[int] = []

    def work(number: int) -> None:
        with stage.stage(f"stage {number}", log=tmp_path / f"{number}.log", record=None, advice=""):
            running.append(number)
            time.sleep(0.02)
            logging.getLogger("aasvd.test").info("by %d", number)
            together.append(len(running))
            running.remove(number)

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 4
    for number in range(4):
        text = (tmp_path / f"{number}.log").read_text()
        assert f"by {number}" in text
        assert len([line for line in text.splitlines() if ": by " in line]) == 1


@pytest.mark.parametrize(("name", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_a_named_float_type_is_used_everywhere(name: str, expected: torch.dtype) -> None:
    assert compute_dtype(name, CPU) == compute_dtype(name, torch.device("cuda")) == expected


def test_auto_is_bfloat16_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert compute_dtype("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert compute_dtype("auto", CPU) == torch.bfloat16


def test_blocks_go_on_in_the_type_of_their_activations(
    chain: Callable[..., Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine begins, another one, that is fast in another type, goes on: keys know only `auto`."""
    monkeypatch.setitem(CALIBRATION, "dtype", "auto")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    run = chain("llama")
    run.original()
    used: list[torch.dtype] = []
    load = blocks.load_block

    def loaded(*arguments: Any, dtype: torch.dtype, **others: Any) -> Any:
        used.append(dtype)
        return load(*arguments, dtype=dtype, **others)

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(blocks, "load_block", loaded)
    run.solve(0)
    run.refine(0)
    run.propagate(0)
    assert Activations(Path(run.path("s1"))).dtype == torch.bfloat16
    # The first is what is solved, the last what activations go through; refinement trains in float32.
    assert used[0] == used[-1] == torch.bfloat16


def test_a_linked_folder_stores_no_byte_twice_and_replaces_what_was_there(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
        (folder / "a").write_text(folder.name)
    (target / "a").chmod(0o444)
    publication._link_folder(source, target)
    assert (target / "a").read_text() == "source"
    assert (target / "a").samefile(source / "a")


def test_a_folder_that_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("source")
    publication._link_folder(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "a").read_text() == "source"


def test_seconds_are_summed_over_blocks() -> None:
    records = [{"stage": f"solve block {n}", "seconds": 1.5} for n in range(3)] + [
        {"stage": "embed", "seconds": 2.0}
    ]
    assert publication._seconds(records) == {"solve": 4.5, "embed": 2.0}


# --- measurements that fail alone -------------------------------------------------------------------------


def test_rows_that_cannot_be_fetched_are_an_artifact_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.parquet"
    arguments = {"data_dir": "", "output": str(output), "cache": str(tmp_path), "log": str(tmp_path / "log")}

    def fetch(definition: sources.TaskDefinition, *, output: Path, **_: Any) -> None:
        if not reachable:
            raise sources.SourceError("the hub is far")
        write_table(output, pa.table({"goal": [definition.settings["task"]]}))

    monkeypatch.setattr(sources, "fetch_task", fetch)
    reachable = False
    stages.fetch_task(task="piqa", **arguments)
    assert sources.failure(read_table(output)) == "the hub is far"
    assert "the hub is far" in failure_file(output).read_text()
    reachable = True
    stages.fetch_task(task="piqa", **arguments)
    assert sources.failure(read_table(output)) is None
    assert not failure_file(output).exists()


def test_a_mistyped_task_fails_its_stage(tmp_path: Path) -> None:
    output = tmp_path / "rows.parquet"
    with pytest.raises(stages.StageError, match="fetch task piqua: 'piqua' is not an lm-eval task"):
        stages.fetch_task(
            task="piqua", data_dir="", output=str(output), cache=str(tmp_path), log=str(tmp_path / "log")
        )
    assert not output.exists()


def test_a_text_that_calibration_needs_fails_its_stage_and_one_for_perplexity_does_not(
    tmp_path: Path,
) -> None:
    for split in ("train", "test"):
        output = tmp_path / split / "text.parquet"
        arguments: dict[str, Any] = {
            "source": {"path": str(tmp_path / "absent.txt")}, "name": "notes", "split": split, "data_dir": "",
            "output": str(output), "cache": str(tmp_path), "log": str(tmp_path / "log"),
        }  # fmt: skip
        if split == "train":
            with pytest.raises(stages.StageError, match=r"absent\.txt does not exist"):
                stages.fetch_text(**arguments)
            assert not output.exists()
        else:
            stages.fetch_text(**arguments)
            assert "does not exist" in failure_file(output).read_text()


def test_a_measurement_names_its_failure_and_forgets_it_once_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, output = tmp_path / "texts" / "notes" / "key" / "test.parquet", tmp_path / "perplexity_notes.json"
    monkeypatch.setattr(evaluation, "model_folder", lambda model: tmp_path)
    monkeypatch.setattr(evaluation, "load_model", lambda folder, settings: (tiny_model("llama"), None))
    monkeypatch.setattr(evaluate, "windows", lambda *_, **__: random_tokens(1))
    found: list[Any] = [evaluate.NonFiniteLossError("3 of 8 windows"), {"perplexity": 9.0}]

    def perplexity(*_: Any, **__: Any) -> Any:
        result = found.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(evaluate, "perplexity", perplexity)
    arguments: dict[str, Any] = {
        "model": "", "text": str(text), "output": str(output), "settings": {"window": 4, "windows": 0},
        "calibration": CALIBRATION, "log": str(tmp_path / "log"),
    }  # fmt: skip
    sources.write_failure(text, "the hub is far")
    for error in ("the hub is far", "3 of 8 windows", None):
        stages.evaluate_perplexity(**arguments)
        record = read_json(output)
        assert record.get("error") == error
        assert failure_file(output).exists() == (error is not None)
        write_table(text, pa.table({"text": ["some words"]}))
    assert record["measurement"] == {"perplexity": 9.0, "dtype": "float32"}


@pytest.mark.parametrize("name", ["opt", "llama"])  # learned and rotary positions
def test_sequences_longer_than_the_model_has_positions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The tiny models have 128."""
    tiny_model(name).save_pretrained(tmp_path / "dense")
    words = trained_tokenizer(["some words"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.save_pretrained(tmp_path / "dense")
    text = tmp_path / "texts" / "notes" / "key" / "test.parquet"
    write_table(text, pa.table({"text": ["a" * 5000]}))
    sampled: dict[str, Any] = {
        "source": str(describe(tmp_path / "dense")), "text": str(text), "seed": 0,
        "output": str(tmp_path / "tokens.parquet"), "log": str(tmp_path / "log"),
    }  # fmt: skip
    settings = {"sequences": 2, "tokens": 129, "sampling": "random"}
    with pytest.raises(stages.StageError, match=r"calibration\.tokens is 129, but the model has 128"):
        stages.sample_calibration(settings=settings, **sampled)
    measured: dict[str, Any] = {
        "model": str(tmp_path / "source.json"), "text": str(text), "output": str(tmp_path / "p.json"),
        "calibration": CALIBRATION, "log": str(tmp_path / "log"),
    }  # fmt: skip
    stages.evaluate_perplexity(settings={"window": 129, "windows": 2}, **measured)
    assert "evaluation.window is 129, but the model has 128" in read_json(tmp_path / "p.json")["error"]
    # As many as it has are well.
    stages.sample_calibration(settings=settings | {"tokens": 128}, **sampled)
    stages.evaluate_perplexity(settings={"window": 128, "windows": 2}, **measured)
    assert read_json(tmp_path / "p.json")["measurement"]["windows"] == 2


def test_a_text_is_asked_for_before_a_model_is_loaded(tmp_path: Path) -> None:
    """A text that could not be fetched costs no loading of many gigabytes."""
    text = tmp_path / "texts" / "notes" / "key" / "test.parquet"
    sources.write_failure(text, "the hub is far")
    stages.evaluate_perplexity(
        model="absent", text=str(text), output=str(tmp_path / "p.json"),
        settings={"window": 4, "windows": 0}, calibration=CALIBRATION, log=str(tmp_path / "log"),
    )  # fmt: skip
    assert read_json(tmp_path / "p.json")["error"] == "the hub is far"


def test_a_token_outside_the_vocabulary_fails_its_measurement_alone(tmp_path: Path) -> None:
    """The tiny model has rows for 128 ids, the tokenizer many more."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    words = trained_tokenizer(["some words"] * 3)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "dense")
    text = tmp_path / "texts" / "notes" / "key" / "test.parquet"
    write_table(text, pa.table({"text": ["éèê" * 50]}))
    stages.evaluate_perplexity(
        model=str(describe(tmp_path / "dense")), text=str(text), output=str(tmp_path / "p.json"),
        settings={"window": 8, "windows": 0}, calibration=CALIBRATION, log=str(tmp_path / "log"),
    )  # fmt: skip
    assert "is outside the model's vocabulary of 128" in read_json(tmp_path / "p.json")["error"]
    assert failure_file(tmp_path / "p.json").exists()


def test_a_damaged_text_is_no_failure_of_its_measurement_alone(tmp_path: Path) -> None:
    text = tmp_path / "texts" / "notes" / "key" / "test.parquet"
    write_table(text, pa.table({"text": ["some words"]}))
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(stages.StageError, match="is damaged"):
        stages.evaluate_accuracy(
            model="", rows=str(text), task="piqa", output=str(tmp_path / "a.json"),
            settings={"limit": 0, "batch": 1}, calibration=CALIBRATION, log=str(tmp_path / "log"),
        )  # fmt: skip
    assert not (tmp_path / "a.json").exists()
