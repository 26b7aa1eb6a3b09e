"""From a model's folder to a pruned checkpoint, against plain implementations on the whole dense model."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TINY, tiny_model
from safetensors.torch import load_file
from stored import random_tokens
from test_stages import CALIBRATION, COMPRESSION, Chain
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from aasvd import checkpoint, stages
from aasvd.artifacts import read_json, read_tensors, write_json, write_tensors
from aasvd.pruned import PrunedLinear
from aasvd.pruning import Removals

CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "shortgpt": {"objective": "unchanged", "allocation": "shortgpt"},
    "blockpruner": {"objective": "unchanged", "allocation": "blockpruner"},
    "wanda-sp": {"objective": "wanda_sp", "allocation": "uniform"},
}


class Pruned(Chain):
    """The stages of one pruning method on one architecture, without refinement unless asked for."""

    def __init__(self, folder: Path, name: str, method: str, ratio: float) -> None:
        tiny_model(name).save_pretrained(folder / "dense")
        super().__init__(folder / "made", folder / "dense", "pruned")
        self.compression = {**COMPRESSION, **METHODS[method], "storage": "pruned", "probe": 3}
        self.model = tiny_model(name)
        self.count = self.original()
        self.outline = json.loads(Path(self.path("outline.json")).read_text())
        self.measured = self.measure(method)
        self.allocate(ratio)

    def measure(self, method: str) -> dict[str, list[str]]:
        if method == "blockpruner":
            self.order()
            return {"removal-3": [self.path("removal")]}
        if method == "wanda-sp":
            return {}
        for block in range(self.count):
            stages.measure_block(
                source=self.path("source.json"),
                covariances=self.path(f"c{block}"),
                gradients=None,
                fisher=None,
                tokens=None,
                inputs=self.path(f"x{block}"),
                outputs=self.path(f"x{block + 1}"),
                upstream=None,
                output=self.path(f"profile{block}"),
                record=self.path(f"profile{block}.json"),
                index=block,
                measure="profile",
                settings=CALIBRATION,
                log=self.log,
            )
        return {"profile": [self.path(f"profile{block}") for block in range(self.count)]}

    def order(self) -> None:
        stages.order_branches(
            source=self.path("source.json"),
            tokens=self.path("tokens.parquet"),
            inputs=self.path("x0"),
            output=self.path("removal"),
            record=self.path("removal.json"),
            probe=3,
            settings=CALIBRATION,
            log=self.log,
        )

    def allocate(self, ratio: float) -> None:
        stages.allocate(
            outline=self.path("outline.json"),
            measured=self.measured,
            positions=None,
            output=self.path("ranks.json"),
            record=self.path("allocate.json"),
            parameter_ratio=ratio,
            compression=self.compression,
            log=self.log,
        )

    def solve(self, block: int, **changed: Any) -> None:
        # Nothing is refined, so what is solved is what goes on.
        own = {"original": None, "output": self.path(f"refined{block}"), "compression": self.compression}
        super().solve(block, **(own | changed))

    def prune(self) -> PreTrainedModel:
        for block in range(self.count):
            self.solve(block)
            self.propagate(block)
        folder = self.assemble(self.count)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def kept(self) -> float:
        """Return the share of the linears' numbers that the checkpoint stores."""
        linears = self.outline["linears"]
        counts = checkpoint.counts(self.folder / "model", list(linears))
        return counts["linears"] / sum(rows * columns for rows, columns in linears.values())

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        found = model.get_submodule(self.outline["path"])
        assert isinstance(found, nn.ModuleList)
        return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(random_tokens(3), use_cache=False).logits
    return found


def test_a_block_that_holds_more_than_linears_is_not_removed(tmp_path: Path) -> None:
    """The experts of a mixture would stay."""
    with pytest.raises(
        stages.StageError, match="MixtralDecoderLayer does not only add what its linears make"
    ):
        Pruned(tmp_path, "mixtral", "shortgpt", 0.7).prune()


@pytest.mark.parametrize("name", [*TINY, "mamba"])
def test_shortgpt_skips_the_block_that_changes_its_input_least(tmp_path: Path, name: str) -> None:
    run = Pruned(tmp_path, name, "shortgpt", 0.7)
    model = run.prune()
    hidden = [read_tensors(Path(run.path(f"x{i}")), device=CPU)["activations"] for i in range(run.count + 1)]
    influence = [
        float(1 - nn.functional.cosine_similarity(x, y, dim=-1).mean()) for x, y in itertools.pairwise(hidden)
    ]
    least = min(range(run.count), key=lambda block: influence[block])
    expected = run.model.double()
    run.blocks(expected)[least].forward = lambda hidden_states, **_arguments: hidden_states
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    assert run.kept() == pytest.approx(1 - 1 / run.count)
    tokens = model.generate(random_tokens(2), max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(tokens, model.generate(random_tokens(2), max_new_tokens=5, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "opt", "gpt_neox"])
def test_blockpruner_leaves_out_branches(tmp_path: Path, name: str) -> None:
    run = Pruned(tmp_path, name, "blockpruner", 0.6)
    model = run.prune()
    removals = read_json(Path(run.path("removal.json")))["removals"]
    assert len(removals) == 2 * run.count
    gone = read_json(Path(run.path("allocate.json")))["removed"]
    expected = run.model.double()
    with torch.no_grad():
        for step in removals[:gone]:
            for inner, module in run.blocks(expected)[step["block"]].named_modules():
                if isinstance(module, nn.Linear) and ("att" in inner) == (step["branch"] == "attention"):
                    for parameter in module.parameters():
                        parameter.zero_()
    found = logits(model)
    torch.testing.assert_close(found, logits(expected), rtol=1e-5, atol=1e-5)
    # The search saw the perplexity of exactly this model, in float32.
    loss = nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), random_tokens(3)[:, 1:].flatten())
    assert removals[gone - 1]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)
    assert run.kept() <= 0.6
    run.allocate(0.9)
    assert read_json(Path(run.path("allocate.json")))["removed"] < gone


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Pruned(tmp_path, "llama", "blockpruner", 0.6)
    whole = Path(run.path("removal")).read_bytes()
    tried: list[int] = []
    original = Removals._try_all

    def watched(self: Removals, gone: list[int], on_trial: Callable[[], object]) -> dict[int, float]:
        tried.append(len(gone))
        if len(tried) == 3:
            raise KeyboardInterrupt
        return original(self, gone, on_trial)

    monkeypatch.setattr(Removals, "_try_all", watched)
    Path(run.path("removal")).unlink()
    with pytest.raises(KeyboardInterrupt):
        run.order()
    assert Path(run.path("removal.partial.json")).exists()
    assert not Path(run.path("removal")).exists()
    run.order()
    assert tried == [0, 1, 2, 2, 3]
    assert Path(run.path("removal")).read_bytes() == whole
    assert not list(run.folder.glob("removal.partial*"))
    # What a failing disk leaves of it is no reason to stop: the search starts anew.
    Path(run.path("removal")).unlink()
    Path(run.path("removal.partial.json")).write_text("[[0, 1.5], [")
    Path(run.path("removal.partial.json.sha256")).write_text("0  of an earlier one")
    run.order()
    assert tried[5:] == [0, 1, 2, 3]
    assert Path(run.path("removal")).read_bytes() == whole


def published_wanda_sp(model: PreTrainedModel, ids: Tensor, *, ratio: float) -> None:
    """Wanda-sp on a whole Llama, as its code does it, with the neurons that the budget leaves.

    Block by block on what the pruned blocks before one return; weights are zeroed in place.
    """
    heads, groups, width = 4, 2, 8
    for layer in model.model.layers:
        seen: dict[str, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(lambda _m, x, seen=seen, name=name: seen.update({name: x[0]}))
            for name, module in {"o": layer.self_attn.o_proj, "down": layer.mlp.down_proj}.items()
        ]
        with torch.no_grad():
            model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        power = {name: x.square().sum((0, 1)).sqrt() for name, x in seen.items()}
        of_heads = (layer.self_attn.o_proj.weight.abs() * power["o"]).mean(0).view(heads, width).sum(1)
        lowest = of_heads.argsort()[: int((1 - ratio) * heads)].tolist()
        stays = torch.tensor([head not in lowest for head in range(heads)])
        shared = stays.view(groups, -1).any(1)
        q, kv = stays.repeat_interleave(width), shared.repeat_interleave(width)
        attention = int(q.sum()) * 32 * 2 + int(kv.sum()) * 32 * 2
        budget = int(ratio * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32))
        neurons = (budget - attention) // (3 * 32)
        of_neurons = (layer.mlp.down_proj.weight.abs() * power["down"]).mean(0)
        n = torch.zeros(48, dtype=torch.bool)
        n[of_neurons.argsort(descending=True)[:neurons]] = True
        with torch.no_grad():
            layer.self_attn.q_proj.weight[~q] = 0
            layer.self_attn.k_proj.weight[~kv] = 0
            layer.self_attn.v_proj.weight[~kv] = 0
            layer.self_attn.o_proj.weight[:, ~q] = 0
            layer.mlp.gate_proj.weight[~n] = 0
            layer.mlp.up_proj.weight[~n] = 0
            layer.mlp.down_proj.weight[:, ~n] = 0


@pytest.mark.parametrize("ratio", [0.4, 0.7])
def test_wanda_sp_is_the_published_method(tmp_path: Path, ratio: float) -> None:
    run = Pruned(tmp_path, "llama", "wanda-sp", ratio)
    expected = copy.deepcopy(run.model).double()
    published_wanda_sp(expected, random_tokens(3), ratio=ratio)
    torch.testing.assert_close(logits(run.prune()), logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_wanda_sp_keeps_entries_of_every_architecture_and_meets_the_budget(tmp_path: Path, name: str) -> None:
    run = Pruned(tmp_path, name, "wanda-sp", 0.6)
    model = run.prune()
    expected = run.model.double()
    for inner, module in model.named_modules():
        if isinstance(module, PrunedLinear):
            dense = expected.get_submodule(inner)
            weight = module.dense().detach()
            same = weight == dense.weight.detach()
            assert (same | (weight == 0)).all() and weight.any()
            with torch.no_grad():
                dense.weight.copy_(weight)
                if dense.bias is not None:
                    dense.bias.copy_(module.bias)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    # One neuron has at most three vectors of 32 numbers; a block has at least 5,000.
    assert 0.6 - 96 / 5000 < run.kept() <= 0.6


@pytest.mark.parametrize(
    ("name", "method"),
    [*itertools.product(["llama", "opt"], METHODS), ("mamba", "shortgpt")],
)
def test_pruned_blocks_are_refined(tmp_path: Path, method: str, name: str) -> None:
    """What stays is trained; what is gone stays gone, and a block that is gone is left alone."""
    run = Pruned(tmp_path, name, method, 0.7)
    for block in range(run.count):
        run.solve(block)
        solved = load_file(run.path(f"refined{block}"))
        write_tensors(Path(run.path(f"solved{block}")), solved)
        run.refine(block, learning_rate=3e-3, epochs=3)
        run.propagate(block)
        refined = load_file(run.path(f"refined{block}"))
        made = read_json(Path(run.path(f"refine{block}.json")))
        sizes = {key: tensor.shape for key, tensor in solved.items() if key.endswith(".kept")}
        assert {key: refined[key].shape for key in sizes} == sizes
        linears = len(run.outline["linears"]) // run.count
        gone = len(sizes) == linears and not any(size.numel() for size in sizes.values())
        if gone or made["before"]["mse"] == 0:
            # Nothing to train, or nothing to repair yet.
            assert made["losses"] == [] and made["refined"] == made["before"]
            assert refined.keys() == solved.keys()
        else:
            assert made["refined"]["mse"] < made["before"]["mse"]
    model = AutoModelForCausalLM.from_pretrained(run.assemble(run.count), dtype=torch.float32)
    assert torch.isfinite(logits(model)).all()
    assert run.kept() <= 0.7


def test_blocks_that_do_more_than_add_are_refused(tmp_path: Path) -> None:
    """OPT-350m normalises behind its branches, so a block without its linears is no identity."""
    model = tiny_model("opt")
    model.config.do_layer_norm_before = False
    model.save_pretrained(tmp_path / "dense")
    run = Chain(tmp_path / "made", tmp_path / "dense", "pruned")
    run.original()
    ranks = read_json(Path(run.path("ranks.json")))["ranks"]
    write_json(Path(run.path("ranks.json")), {"ranks": dict.fromkeys(ranks, 0)})
    with pytest.raises(stages.StageError, match="OPTDecoderLayer does not only add what its linears make"):
        compression = {**COMPRESSION, **METHODS["shortgpt"], "storage": "pruned"}
        run.solve(0, original=None, shifted=None, compression=compression)
