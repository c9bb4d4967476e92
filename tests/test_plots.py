"""Figures: what is drawn is what was given, and the SVG is fit for a page."""

import re
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from selfsup_ray import plots


@pytest.fixture
def ax() -> Axes:
    return Figure().add_subplot()


def test_cluster_sizes_are_bars_from_large_to_small_and_the_dashed_line_is_their_mean(ax: Axes):
    plots.plot_cluster_sizes(np.array([3, 9, 0, 4]), ax)
    assert [bar.get_height() for bar in ax.patches] == [9, 4, 3, 0]
    assert set(ax.lines[0].get_ydata()) == {4.0}
    assert ax.get_title() == "4 clusters, 16 images"


def test_confidence_bars_are_percent_and_the_title_counts_the_last_tenth(ax: Axes):
    p = np.random.default_rng(0).uniform(size=500)
    counts, edges = np.histogram(p, bins=20, range=(0, 1))
    plots.plot_confidence(counts, edges, ax)
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(100)
    assert f"{100 * (p >= 0.9).mean():.0f} % of images above 0.9" in ax.get_title()


def test_a_series_is_drawn_with_gaps_where_a_value_is_missing(ax: Axes):
    steps, loss = np.array([1, 2, 3]), np.array([5.0, np.nan, 4.0])
    plots.plot_series(steps, {"loss": loss}, ax, ylabel="loss", title="t")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), loss)
    assert ax.get_legend() is None, "one curve is named by its axis"


def test_neighbor_ranks_show_the_median_and_the_agreement(ax: Axes):
    similarity = np.array([[0.8, 0.9, 1.0], [0.5, 0.6, 0.7]])
    plots.plot_neighbor_ranks(similarity, np.array([1.0, 0.25]), ax, num_images=2)
    median, agreement = (line.get_ydata() for line in ax.lines)
    assert list(median) == [0.9, 0.6] and list(agreement) == [1.0, 0.25]


def test_in_degrees_are_percent_of_images_with_plain_numbers_on_both_axes(ax: Axes):
    counts = np.array([2, 0, 5, 0, 0, 1])
    plots.plot_in_degrees(counts, ax)
    points = ax.collections[0].get_offsets()
    np.testing.assert_allclose(points, [[0, 25], [2, 62.5], [5, 12.5]])
    assert ax.lines[0].get_xdata()[0] == 15 / 8 and ax.get_title() == "listed at most 5 times"
    drawn = plots.svg(partial(plots.plot_in_degrees, counts), width=5, height=3, label="hubs")
    assert "mathdefault" not in drawn


def test_a_confusion_matrix_writes_the_counts_and_shades_by_the_share_of_the_class(ax: Axes):
    counts = np.array([[9, 0, 1], [2, 2, 0]])
    names = {"rows": ["cat", "dog"], "columns": ["4", "0", "2"]}
    plots.plot_confusion(counts, ax, **names, share_of="class")
    written = {text.get_position()[::-1]: int(text.get_text()) for text in ax.texts}
    assert written == {(0, 0): 9, (0, 2): 1, (1, 0): 2, (1, 1): 2}, "zeros stay empty"
    alpha = ax.images[0].get_array()[..., 3]
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            assert alpha[i, j] == pytest.approx((count / sum(row)) ** 0.5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog"]


def test_with_more_clusters_than_classes_the_shade_is_the_share_of_the_cluster(ax: Axes):
    counts = np.array([[9, 0, 1], [3, 2, 0]])
    names = {"rows": ["cat", "dog"], "columns": ["4", "0", "2"]}
    plots.plot_confusion(counts, ax, **names, share_of="cluster")
    alpha = ax.images[0].get_array()[..., 3]
    np.testing.assert_allclose(alpha**2, [[0.75, 0, 1], [0.25, 1, 0]])


def test_a_covariance_is_as_opaque_as_the_root_of_its_values_and_orange_below_zero(ax: Axes):
    plots.plot_covariance(np.array([[4.0, -1.0], [-1.0, 0.0]]), ax, title="t")
    cells = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(cells[..., 3], [[1, 0.5], [0.5, 0]])
    assert to_hex(cells[0, 0, :3]) == "#2f6fb3"
    assert to_hex(cells[0, 1, :3]) == "#d9822b"


def test_a_map_draws_every_image_in_its_group_s_hue_and_names_groups_at_their_median(ax: Axes):
    xy = np.array([[0.0, 0], [2, 0], [4, 6], [9, 9]])
    groups = np.array([0, 0, 0, -1])
    hues = np.array([17, 17, 17, -1])  # more groups than colours: they come round again
    plots.plot_map(xy, groups, ax, names={0: "shoe"}, title="t", hues=hues)
    unknown, known = ax.collections
    np.testing.assert_array_equal(unknown.get_offsets(), xy[3:])
    np.testing.assert_array_equal(known.get_offsets(), xy[:3])
    drawn = {to_hex(color) for color in known.get_facecolors()}
    assert drawn == {plots.HUES[17 - len(plots.HUES)]}
    assert ax.texts[0].get_text() == "shoe" and ax.texts[0].get_position() == (2, 0)


def bars(ax: Axes) -> None:
    plots.plot_cluster_sizes(np.array([2, 1]), ax)


def test_equal_input_gives_equal_bytes():
    drawn = [plots.svg(bars, width=3, height=2, label="sizes") for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_an_svg_is_well_formed_takes_the_theme_and_no_fixed_size():
    text = plots.svg(bars, width=3, height=2, label='sizes <of> "all"')
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == 'sizes <of> "all"'
    assert root.get("width") is None and root.get("viewBox", "").startswith("0 0 216 144")
    assert "currentColor" in text and plots.INK not in text
    assert "2 clusters, 3 images" in "".join(root.itertext()), "text stays text"


def test_two_figures_on_a_page_share_no_identifier():
    first, second = (
        set(re.findall(r'id="([^"]+)"', plots.svg(bars, width=3, height=2, label=label)))
        for label in ("scan loss", "pretext loss")
    )
    assert first and not first & second


def test_names_with_dollars_or_foreign_letters_are_written_as_they_are():
    names = ["$10 & $20", "靴", "<b>"]
    given = {"rows": names, "columns": ["0", "1", "2"], "share_of": "class"}
    draw = partial(plots.plot_confusion, np.eye(3, dtype=int), **given)
    text = plots.svg(draw, width=4, height=3, label="confusion")
    written = "".join(ElementTree.fromstring(text).itertext())
    assert all(name in written for name in names)


def test_shortened_text_is_never_longer_than_asked():
    assert plots.shortened("sneaker", 7) == "sneaker"
    assert plots.shortened("ankle boot", 7) == "ankle…"
    assert max(len(plots.shortened("a b" * 9, n)) - n for n in range(1, 30)) <= 0
