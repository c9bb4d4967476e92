"""Low-shot protocol: splits, the choice of images and hit rates against plain loops."""

import numpy as np
import pytest

from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.lowshot import (
    base_block,
    best_of,
    choose_novel,
    derived_split,
    hit_rates,
    label_ranks,
    labelled_block,
    mean_and_std,
    read_split,
    setups,
)


def file_labels(num_classes: int = 9, n: int = 400) -> np.ndarray:
    return np.random.default_rng(0).integers(0, num_classes, n)


def test_imagenets_counts_come_out_of_its_shares():
    split = derived_split(np.arange(1000), num_base=389)
    assert {name: len(part) for name, part in split.items()} == {
        "base_val": 193,
        "novel_val": 300,
        "base_test": 196,
        "novel_test": 311,
    }
    made = setups(split)
    assert (made["val"].num_classes, made["test"].num_classes) == (493, 507)
    assert made["test"].is_novel.sum() == 311


def test_relabelling_keeps_the_order_and_marks_the_other_classes():
    split = {
        "base_val": np.array([7, 2]),
        "novel_val": np.array([5]),
        "base_test": np.array([0]),
        "novel_test": np.array([9, 4]),
    }
    made = setups(split)
    np.testing.assert_array_equal(made["val"].classes, [2, 5, 7])
    np.testing.assert_array_equal(made["val"].is_novel, [False, True, False])
    labels = np.array([5, 2, 7, 4, -1, 100, 2])
    np.testing.assert_array_equal(made["val"].relabelled(labels), [1, 0, 2, -1, -1, -1, 0])


def test_overlapping_splits_and_empty_ones_are_refused():
    split = {
        "base_val": np.array([0, 1]),
        "novel_val": np.array([2]),
        "base_test": np.array([3]),
        "novel_test": np.array([4, 1]),
    }
    with pytest.raises(ConfigError, match="class 1 both in novel_test and in base_val"):
        setups(split)
    with pytest.raises(ConfigError, match="leaves novel_val without a class: 4 classes"):
        derived_split(np.arange(4), num_base=3)


def test_a_split_file_holds_numbers_from_one_or_names():
    lists = {
        "first_class": 1,
        "base_val": [3, 1],
        "novel_val": [2],
        "base_test": ["dog"],
        "novel_test": ["cat"],
    }
    split = read_split(lists, where="split.json", names=["a", "b", "c", "dog", "cat"])
    np.testing.assert_array_equal(split["base_val"], [0, 2])
    np.testing.assert_array_equal(split["base_test"], [3])
    with pytest.raises(ConfigError, match="names 'dog', which is no class of the corpus"):
        read_split(lists, where="split.json", names=None)
    with pytest.raises(ConfigError, match="has no list `novel_test`"):
        read_split({part: [1] for part in list(lists)[1:4]}, where="split.json", names=None)
    with pytest.raises(ConfigError, match=r"base_val must list each of its classes once"):
        read_split(lists | {"base_val": [0]}, where="split.json", names=None)


def test_the_legacy_choice_is_the_published_loop():
    labels, is_novel = file_labels(), np.arange(9) % 2 == 1
    random_state = np.random.RandomState(3)
    expected = []
    for c in range(9):
        index = [i for i in range(len(labels)) if labels[i] == c]
        if not is_novel[c]:
            continue
        index = np.array(index)
        random_state.shuffle(index)
        expected.append(index[:5])
    found = choose_novel(labels, is_novel, n=5, seed=3)
    np.testing.assert_array_equal(np.array(found), np.array(expected))


@pytest.mark.parametrize("draw", ["legacy", "modern"])
def test_images_for_a_smaller_n_are_among_those_for_a_larger_one(draw):
    labels, is_novel = file_labels(), np.arange(9) > 4
    few = choose_novel(labels, is_novel, n=2, seed=1, draw=draw)
    many = choose_novel(labels, is_novel, n=20, seed=1, draw=draw)
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a, b[:2])
    other = choose_novel(labels, is_novel, n=20, seed=2, draw=draw)
    assert any(set(a) != set(b) for a, b in zip(many, other, strict=True))
    with pytest.raises(ConfigError, match="fewer than n=200"):
        choose_novel(labels, is_novel, n=200, seed=1, draw=draw)


def test_the_modern_choice_of_a_class_does_not_depend_on_the_other_classes():
    labels = file_labels()
    all_novel = choose_novel(labels, np.arange(9) > 4, n=3, seed=1, draw="modern")
    last = choose_novel(labels, np.arange(9) == 8, n=3, seed=1, draw="modern")
    np.testing.assert_array_equal(all_novel[-1], last[0])


def test_the_labelled_block_is_base_in_file_order_then_novel_then_the_unused():
    labels, is_novel = file_labels(), np.arange(9) > 5
    labels[::7] = -1
    block = labelled_block(labels, is_novel, n=4, seed=1, in_domain=True)
    base = [i for c in range(6) for i in range(len(labels)) if labels[i] == c]
    chosen = np.concatenate(choose_novel(labels, is_novel, n=4, seed=1))
    unused = [
        i for c in (6, 7, 8) for i in range(len(labels)) if labels[i] == c and i not in chosen
    ]
    np.testing.assert_array_equal(block.images, [*base, *chosen, *unused])
    known = [*labels[base], *labels[chosen], *[-1] * len(unused)]
    np.testing.assert_array_equal(block.classes, known)
    np.testing.assert_array_equal(base_block(labels, is_novel), base)
    without = labelled_block(labels, is_novel, n=4, seed=1)
    np.testing.assert_array_equal(without.images, block.images[: len(base) + 12])


def test_ranks_settle_ties_by_the_lowest_class():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (200, 7)).astype(np.float32)
    classes = rng.integers(0, 7, 200)
    ranks = label_ranks(scores, classes)
    for row, c, rank in zip(scores, classes, ranks, strict=True):
        order = sorted(range(7), key=lambda j: (-row[j], j))
        assert order.index(c) == rank
    scores[3] = np.nan
    assert label_ranks(scores, classes)[3] == 7


def test_the_rate_over_all_images_is_the_mean_of_base_and_novel_by_their_images():
    rng = np.random.default_rng(0)
    is_novel = np.arange(507) >= 196
    classes = np.repeat(np.arange(507), 50)
    rates = hit_rates(rng.integers(0, 12, len(classes)), classes, is_novel)
    for top in (1, 5):
        base, novel = rates[f"top{top}_base"], rates[f"top{top}_novel"]
        assert rates[f"top{top}_all"] == pytest.approx((9800 * base + 15550 * novel) / 25350)
    assert 0 < rates["top1_all"] < rates["top5_all"] < 1


def test_the_spread_over_seeds_is_the_population_one():
    rows = [{"a": 0.1}, {"a": 0.4}, {"a": 0.7}]
    found = mean_and_std(rows)["a"]
    assert found["mean"] == pytest.approx(0.4)
    assert found["std"] == pytest.approx(np.sqrt(0.06))
    assert best_of(np.array([0.1, np.nan, 0.3, 0.3])) == 2
