"""Stages that write what people look at: results, tables, figures."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from aasvd import blocks, checkpoint, comparison, figures, latents, paper, params, progress, report, results
from aasvd.artifacts import read_json, replacing, write_json, write_table
from aasvd.provenance import code_digest, git_state, versions
from aasvd.stages.stage import PASSES, stage


def write_key(*, ingredients: Mapping[str, Any], output: str) -> None:
    """Write down what a key was made from."""
    write_json(Path(output), ingredients)


def publish(
    *,
    source: str,
    outline: str,
    checksums: str,
    records: Sequence[str],
    dense: Sequence[str],
    compressed: Sequence[str],
    outdated: str | None,
    evaluation: str,
    model: str,
    table: str,
    figure: str,
    blocks_file: str,
    run: params.Run,
    base: Mapping[str, Any],
    keys: Mapping[str, Any],
    log: str,
) -> None:
    """Gather a run's numbers and put them, its checkpoint and its figure under results/<run>/."""
    with stage(f"publish {run.name}", log=Path(log), record=None, advice=PASSES):
        folder = Path(checksums).parent
        checkpoint.verify(folder)
        dense_source = blocks.Source(Path(source))
        described = read_json(Path(outline))
        shapes = described["linears"]
        stored = checkpoint.counts(folder, list(shapes))
        before = sum(rows * columns for rows, columns in shapes.values())
        made = [read_json(Path(record)) for record in records]
        measured = map(results.read_measurement, dense), map(results.read_measurement, compressed)
        everything = [*made, *(read_json(Path(file)) for file in [*dense, *compressed])]
        result = {
            "run": run.name,
            "model": run.model,
            "method": run.settings["compression"]["method"],
            "objective": run.settings["compression"]["objective"],
            "allocation": run.settings["compression"]["allocation"],
            "storage": run.settings["compression"]["storage"],
            "precision": run.settings["compression"]["precision"],
            "refined": run.settings["refinement"]["epochs"] > 0,
            **{name: run.settings[name] for name in ("calibration", "refinement", "post")},
            "ratio": {"target": run.ratio, "achieved": stored["linears"] / before},
            "parameters": {
                "dense": checkpoint.parameter_count(blocks.skeleton(dense_source.folder).model),
                "compressed": stored["model"],
                "linears": {"dense": before, "compressed": stored["linears"]},
            },
            "bytes": {"dense": dense_source.byte_count(), "compressed": stored["bytes"]},
            "cache_bytes_per_token": latents.summary(checkpoint.outline(folder)),
            **results.side_by_side(*measured),
            "evaluation": run.settings["evaluation"],
            "seconds": _seconds(everything),
            **results.peaks(made),
            "provenance": {
                "versions": versions(),
                "keys": keys,
                "git": git_state(),
                "code": code_digest(),
                "made_by_other_code": sorted(
                    {entry["stage"] for entry in everything if entry["code"] != code_digest()}
                ),
            },
        }
        report.write_distortion(made, output=Path(figure), run=run.name)
        with replacing(Path(blocks_file)) as temporary:
            temporary.write_text(json.dumps(results.blocks(made), indent=2, allow_nan=False) + "\n")
        report.write_table(result, output=Path(table))
        _link_folder(folder, Path(model))
        quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
        card = report.model_card(
            result,
            base=base,
            shapes=shapes,
            ranks=quantization["ranks"],
            kept=quantization["kept"],
            path=described["path"],
        )
        checkpoint.add_file(Path(model), "README.md", card)
        # Last and whole, because its keys say whether all of the above is up to date.
        with replacing(Path(evaluation)) as temporary:
            temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        if outdated:
            Path(outdated).unlink()
        progress.report(now=True, state="finished")
        tqdm.write(report.summary(result, model=model))


def collect(*, output: str, log: str) -> None:
    """Gather all finished runs in one table."""
    with stage("collect runs", log=Path(log), record=None, advice=PASSES):
        write_table(Path(output), results.table())


def compare(
    *,
    evaluations: Sequence[str],
    published: str,
    page: str,
    markdown: str,
    latex: str,
    parquet: str,
    figure: str,
    contents: str,
    compared: params.Comparison,
    shown: Mapping[str, Any],
    log: str,
) -> None:
    """Put all runs of a comparison into one table, in four formats, and a figure; note what they show."""
    with stage(f"compare {compared.model}", log=Path(log), record=None, advice=PASSES):
        found = [json.loads(Path(file).read_text()) for file in evaluations]
        by_run = dict(zip(compared.runs, found, strict=True))
        rows = [
            comparison.dense_row(found),
            *(
                comparison.run_row(result, method=method, variant=variant)
                for (method, variant, _), result in by_run.items()
            ),
        ]
        theirs = json.loads(Path(published).read_text())
        figures.write_curves(rows, output=Path(figure), title=f"Perplexity of {compared.model}")
        comparison.write(
            {
                f"Measured on {compared.model}": rows,
                f"Reported for {theirs['model']}, not measured here": comparison.reported_rows(
                    theirs, compared.ratios
                ),
            },
            notes=[comparison.measured_note(by_run, compared.left_out), comparison.reported_note(theirs)],
            figure=Path(figure),
            page=Path(page),
            markdown=Path(markdown),
            latex=Path(latex),
            parquet=Path(parquet),
        )
        with replacing(Path(contents)) as temporary:
            temporary.write_text(json.dumps(shown, indent=2) + "\n")
        tqdm.write(f"the comparison of {len(found)} runs lies in {page}")


def present(*, name: str, log: str, **arguments: Any) -> None:
    """Write one of the paper's tables or figures: the function of this name in `aasvd.paper`."""
    with stage(f"paper {name}", log=Path(log), record=None, advice=PASSES):
        if "runs" in arguments:
            write_table(Path(arguments["runs"]), results.table())
        getattr(paper, name)(**arguments)


def _seconds(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for record in records:
        name = record["stage"].split(" block", 1)[0]
        totals[name] = totals.get(name, 0.0) + record["seconds"]
    return totals


def _link_folder(source: Path, target: Path) -> None:
    """Make a folder of hard links, so that no byte is stored twice; copies where links are not possible."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = target / file.name
        link.unlink(missing_ok=True)
        try:
            link.hardlink_to(file)
        except OSError:
            # Another file system, or one without hard links.
            shutil.copyfile(file, link)
