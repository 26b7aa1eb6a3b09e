import itertools
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from aasvd import figures
from aasvd.figures import Series

ONE = Series("aasvd", [1, 2, 3], [0.1, 0.2, 0.4])
TWO = Series("svd", [1, 2, 3], [0.3, 0.5, 0.9])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that the test draws, in order."""
    found: list[Figure] = []

    def kept(**settings: Any) -> Figure:
        found.append(Figure(**settings))
        return found[-1]

    monkeypatch.setattr(figures, "Figure", kept)
    return found


def draw(folder: Path, name: str) -> list[Path]:
    outputs = [folder / f"{name}.png", folder / f"{name}.svg"]
    shared: dict[str, Any] = {"title": "model at ratio 0.6", "outputs": outputs}
    if name == "depth":
        figures.depth([ONE, TWO], [70.0, 2e4], dense=18.3, text="wikitext2", **shared)
    elif name == "sweep":
        accuracy = Series("compressed", [16, 32], [40.0, 41.0])
        dense = {"ptb": 30.0}
        perplexity = [Series("ptb", [16, 32], [90.0, 80.0])]
        figures.sweep(perplexity, accuracy, dense=dense, dense_accuracy=50.0, tasks="7 tasks", **shared)
    else:
        figures.layers([ONE, TWO], [TWO, ONE], **shared)
    return outputs


@pytest.mark.parametrize("name", ["depth", "sweep", "layers"])
def test_a_figure_is_a_png_and_an_svg_with_the_same_bytes_every_time(tmp_path: Path, name: str) -> None:
    (tmp_path / "again").mkdir()
    for first, second in zip(draw(tmp_path, name), draw(tmp_path / "again", name), strict=True):
        assert first.read_bytes() == second.read_bytes()
    content = (tmp_path / f"{name}.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000 and height > 400
    assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_a_figure_without_accuracy_or_dense_numbers_is_drawn(tmp_path: Path) -> None:
    outputs = [tmp_path / "sweep.svg"]
    figures.sweep([ONE], None, dense={}, dense_accuracy=None, title="", tasks="0 tasks", outputs=outputs)
    figures.sweep(
        [], None, dense={}, dense_accuracy=None, title="", tasks="", outputs=[tmp_path / "none.svg"]
    )
    figures.depth([], [], dense=None, text="", title="", outputs=[tmp_path / "depth.svg"])
    assert all(file.stat().st_size > 1000 for file in tmp_path.iterdir())


@pytest.mark.parametrize("values", [(900, 40), (44, 41), (9e4, 12), (7, 3)])
def test_numbers_along_a_logarithmic_axis_lie_beside_one_another(
    tmp_path: Path, drawn: list[Figure], values: tuple[float, float]
) -> None:
    series, outputs = Series("ptb", [16, 1024], values), [tmp_path / "sweep.png"]
    figures.sweep([series], None, dense={}, dense_accuracy=None, title="", tasks="", outputs=outputs)
    axis = drawn[0].axes[0].yaxis
    low, high = drawn[0].axes[0].get_ylim()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    named = [tick for tick in ticks if tick.label1.get_text() and low <= tick.get_loc() <= high]
    boxes = sorted((tick.label1.get_window_extent() for tick in named), key=lambda box: box.y0)
    assert len(boxes) >= 3
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


def test_curves_have_a_panel_per_text_and_variant_and_a_line_per_method(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    numbers = {("svd", "", 0.4): 1e7, ("svd", "", 0.8): 90.0, ("a", "", 0.4): 60.0, ("a", "more", 0.4): 50.0}
    rows = [
        {"method": method, "variant": variant, "ratio": ratio, "perplexity t": value}
        for (method, variant, ratio), value in numbers.items()
    ]
    dense = {"method": "dense", "variant": "", "ratio": 1.0, "perplexity t": 20.0}
    figures.write_curves([dense, *rows], output=tmp_path / "x.svg", title="t")
    declared, more = drawn[0].axes
    assert [axes.get_title() for axes in (declared, more)] == ["as declared", "more"]
    lines = {line.get_label(): list(line.get_ydata()) for line in declared.lines}
    assert lines == {"svd": [1e7, 90.0], "a": [60.0], "dense": [20.0, 20.0]}
    assert [list(line.get_ydata()) for line in more.lines] == [[], [50.0], [20.0, 20.0]]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["svd", "a", "dense"]
    # What fails goes off the top and is named there, and the others stay apart.
    assert declared.get_ylim()[1] == more.get_ylim()[1] == 2000
    assert [text.get_text() for text in declared.texts] == ["also above 2000: svd"] and not more.texts
    # One method under many rules: a line for each of these.
    swapped = [{**row, "method": "a", "variant": f"rule {number}"} for number, row in enumerate(rows)]
    figures.write_curves(swapped, output=tmp_path / "y.svg", title="t")
    (only,) = drawn[1].axes
    assert [line.get_label() for line in only.lines] == [f"rule {number}" for number in range(4)]


def test_series_differ_in_colour_marker_or_dash_and_neighbours_in_all() -> None:
    styles = [
        tuple(figures.style(number)[key] for key in ("color", "marker", "linestyle")) for number in range(28)
    ]
    assert len(set(styles)) == 28
    for first, second in itertools.pairwise(styles):
        assert all(a != b for a, b in zip(first, second, strict=True))


def test_colours_differ_in_greyscale() -> None:
    def luminance(colour: str) -> float:
        red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for first, second in itertools.pairwise(figures.PALETTE):
        assert abs(luminance(first) - luminance(second)) > 0.05
