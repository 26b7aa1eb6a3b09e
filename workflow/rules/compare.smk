"""One table of many methods: whatever has not been run is run, sharing the originals."""


def comparison_of(wildcards):
    """The runs of a comparison."""
    compared = checked(params.parse_comparison, config, wildcards.comparison)
    REQUESTED.update(dict.fromkeys(run.name for run in compared.runs.values()))
    return compared


PUBLISHED = workflow.source_path("../published.json")


def compared(wildcards):
    """What a comparison shows: its runs in their order, what is left out, and what others report."""
    found = comparison_of(wildcards)
    return {
        "runs": [run.name for run in found.runs.values()],
        "left_out": {" ".join(names): why for names, why in found.left_out.items()},
        "published": identity.key_of(json.loads(pathlib.Path(PUBLISHED).read_text())),
    }


def uncompared(wildcards):
    """A marker newer than the page where that shows something else: a run that goes changes no input's age."""
    written = pathlib.Path(f"results/compare/{wildcards.comparison}.json")
    return [marker(written)] if written.exists() and json.loads(written.read_text()) != compared(wildcards) else []


def compared_in_report(what):
    """Where the report shows a part of a comparison."""
    labels = {"runs": "{comparison}", "what": what}
    return {"caption": "../report/compare.rst", "category": "Comparison", "labels": labels}


rule compare:
    """Compare methods at several ratios: a table in four formats, and perplexity against ratio."""
    input:
        evaluations=lambda w: [f"results/{run.name}/eval.json" for run in comparison_of(w).runs.values()],
        published=ancient(PUBLISHED),
        uncompared=uncompared,
    output:
        page=report("results/compare/{comparison}.html", **compared_in_report("all methods")),
        markdown="results/compare/{comparison}.md",
        latex="results/compare/{comparison}.tex",
        parquet="results/compare/{comparison}.parquet",
        contents="results/compare/{comparison}.json",
        figure=report("results/compare/{comparison}.svg", **compared_in_report("perplexity against ratio")),
    log:
        "logs/compare/{comparison}.log",
    wildcard_constraints:
        comparison=rf"([A-Za-z0-9-]+/)?[A-Za-z0-9][A-Za-z0-9._-]*_r{params.RATIOS}",
    params:
        compared=comparison_of,
        shown=compared,
    run:
        unwatched.compare(
            evaluations=input.evaluations, published=input.published, **output, **params, log=log[0]
        )
