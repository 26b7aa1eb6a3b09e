"""One table of many methods: whatever has not been run is run, sharing the originals."""


def comparison_of(wildcards):
    """The runs of a comparison."""
    return checked(params.parse_comparison, config, wildcards.comparison)


rule compare:
    """Compare methods at several ratios: a table in four formats, and perplexity against ratio."""
    input:
        evaluations=lambda w: [f"results/{run.name}/eval.json" for run in comparison_of(w).runs.values()],
        published=ancient(workflow.source_path("../published.json")),
    output:
        page=report(
            "results/compare/{comparison}.html",
            caption="../report/compare.rst",
            category="Comparison",
            labels={"runs": "{comparison}", "what": "all methods"},
        ),
        markdown="results/compare/{comparison}.md",
        latex="results/compare/{comparison}.tex",
        parquet="results/compare/{comparison}.parquet",
        figure=report(
            "results/compare/{comparison}.svg",
            caption="../report/compare.rst",
            category="Comparison",
            labels={"runs": "{comparison}", "what": "perplexity against ratio"},
        ),
    log:
        "logs/compare/{comparison}.log",
    wildcard_constraints:
        comparison=r"([A-Za-z0-9-]+/)?[A-Za-z0-9][A-Za-z0-9._-]*_r[0-9.]+(-[0-9.]+)*",
    params:
        compared=comparison_of,
    run:
        stages(wildcards).compare(**input, **output, compared=params.compared, log=log[0])
