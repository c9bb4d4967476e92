"""Published files: read as written, written back byte for byte, damaged ones refused in a line."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from selfsup_ray.data.published import (
    FeatureBlocks,
    open_rows,
    raw_matrix,
    read_class_split,
    sampled_digest,
    write_feature_block,
    write_raw_matrix,
)
from selfsup_ray.data.published_graph import (
    checked_rows,
    open_graph,
    self_column,
    with_column,
    without_column,
    write_graph,
)
from selfsup_ray.errors import ArtifactError


def rows_of(n: int, d: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)


def test_the_first_rows_of_a_raw_matrix_are_mapped_not_read(tmp_path: Path):
    rows, path = rows_of(50), tmp_path / "features.float32"
    rows.tofile(path)
    found = open_rows([path], dim=6, num_rows=20)
    assert found.shape == (20, 6)
    np.testing.assert_array_equal(found.read(5, 20), rows[5:20])
    assert isinstance(raw_matrix(path, dtype="<f4", dim=6), np.memmap)
    write_raw_matrix(tmp_path / "again", np.split(rows, [7, 30]), dtype="<f4")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("dim", "num_rows", "message"),
    [
        (7, None, r"1,200 bytes, which is no whole number of rows of 7"),
        (6, 51, r"has 50 rows of 6, but 51 are asked for"),
        (None, None, r"does not say its width. Give dim"),
    ],
)
def test_a_raw_matrix_that_does_not_fit_is_refused(tmp_path: Path, dim, num_rows, message):
    rows_of(50).tofile(tmp_path / "features.float32")
    with pytest.raises(ArtifactError, match=message):
        open_rows([tmp_path / "features.float32"], dim=dim, num_rows=num_rows)
    with pytest.raises(ArtifactError, match="is not there"):
        open_rows([tmp_path / "absent"], dim=6)


def hdf5_block(path: Path, features: np.ndarray, labels: np.ndarray, batch: int) -> None:
    """A block as the extraction leaves it: resized to whole batches, rubbish beyond `count`."""
    size = -(-len(features) // batch) * batch
    with h5py.File(path, "w") as file:
        file["all_feats"] = np.full((size, features.shape[1]), np.nan, np.float32)
        file["all_feats"][: len(features)] = features
        file["all_labels"] = np.full(size, -7, np.int32)
        file["all_labels"][: len(labels)] = labels
        file["count"] = np.array([len(features)], np.int32)


def test_only_the_counted_rows_of_blocks_in_the_order_of_their_numbers_are_read(tmp_path: Path):
    rows, labels = rows_of(41), np.arange(41)
    cuts = {"block0": (0, 17), "block2": (17, 20), "block10": (20, 41)}
    for name, (a, b) in cuts.items():
        hdf5_block(tmp_path / f"{name}.hdf5", rows[a:b], labels[a:b], batch=8)
    blocks = FeatureBlocks(sorted(tmp_path.glob("*.hdf5")))
    assert blocks.shape == (41, 6)
    np.testing.assert_array_equal(blocks.read(0, 41), rows)
    np.testing.assert_array_equal(blocks.read(16, 22), rows[16:22])
    np.testing.assert_array_equal(blocks.labels(16, 22), labels[16:22])
    assert open_rows(sorted(tmp_path.glob("*.hdf5")), dim=None, num_rows=30).shape == (30, 6)
    with pytest.raises(ArtifactError, match="41 rows in all, but 42 are asked for"):
        open_rows(sorted(tmp_path.glob("*.hdf5")), dim=None, num_rows=42)


def test_a_written_block_is_read_as_it_was(tmp_path: Path):
    write_feature_block(tmp_path / "b0.h5", rows_of(11), np.arange(11), batch=4)
    with h5py.File(tmp_path / "b0.h5") as file:
        assert file["all_feats"].shape == (12, 6) and file["count"].shape == (1,)
        assert file["all_labels"].dtype == np.int32
    np.testing.assert_array_equal(FeatureBlocks([tmp_path / "b0.h5"]).read(0, 11), rows_of(11))


def test_damaged_blocks_are_refused(tmp_path: Path):
    path = tmp_path / "block0.h5"
    hdf5_block(path, rows_of(40), np.arange(40), batch=8)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"block0.h5 cannot be read as HDF5 features"):
        FeatureBlocks([path])
    path.write_bytes(b"not an HDF5 file")
    with pytest.raises(ArtifactError, match=r"block0.h5 cannot be read as HDF5 features"):
        FeatureBlocks([path])
    with h5py.File(path, "w") as file:
        file["features"] = rows_of(3)
    with pytest.raises(ArtifactError, match="it needs all_feats, all_labels and count"):
        FeatureBlocks([path])
    with h5py.File(path, "w") as file:
        file["all_feats"], file["all_labels"], file["count"] = rows_of(3), np.arange(3), [4]
    with pytest.raises(ArtifactError, match="count is 4, but all_feats has 3 rows"):
        FeatureBlocks([path])
    with h5py.File(path, "w") as file:
        file["all_feats"], file["all_labels"], file["count"] = np.eye(3), np.arange(3), [3]
    with pytest.raises(ArtifactError, match=r"all_feats is \(3, 3\) float64, wanted"):
        FeatureBlocks([path])
    hdf5_block(tmp_path / "block1.h5", rows_of(4, 5), np.arange(4), batch=1)
    hdf5_block(path, rows_of(4), np.arange(4), batch=1)
    with pytest.raises(ArtifactError, match=r"differ in width \(\[5, 6\]\)"):
        FeatureBlocks([path, tmp_path / "block1.h5"])


def published(folder: Path, ids: np.ndarray, similarity: np.ndarray, k: int, suffix: int) -> Path:
    """Write a graph as the original does: the suffix follows k, the numbers have 32 bits."""
    n = len(ids)
    ids.astype("<i4").tofile(folder / f"ndis{n}_k{k}_I_11.int{suffix}")
    similarity.astype("<f4").tofile(folder / f"ndis{n}_k{k}_D_11.float{suffix}")
    return folder / f"ndis{n}_k{k}_I_11.int{suffix}"


def nearest(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows = rows_of(n)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    ids = np.argsort(-similarity, axis=1)[:, :k].astype(np.int32)
    return ids, np.take_along_axis(similarity, ids, axis=1)


@pytest.mark.parametrize("k", [8, 32, 64])
def test_the_suffix_follows_k_but_numbers_have_32_bits(tmp_path: Path, k: int):
    ids, similarity = nearest(90, k)
    graph = open_graph(published(tmp_path, ids, similarity, k, suffix=k))
    assert graph.shape == (90, k) and isinstance(graph.ids, np.memmap)
    np.testing.assert_array_equal(graph.ids, ids)
    np.testing.assert_array_equal(graph.similarity, similarity)
    fewer = open_graph(graph.path, columns=5)
    np.testing.assert_array_equal(fewer.ids, ids[:, :5])


def test_a_graph_is_written_under_its_name_with_the_same_bytes(tmp_path: Path):
    ids, similarity = nearest(90, 32)
    path = published(tmp_path, ids, similarity, 32, suffix=32)
    graph = open_graph(path)
    parts = ((graph.ids[a : a + 40], graph.similarity[a : a + 40]) for a in range(0, 90, 40))
    for written in write_graph(tmp_path / "again", parts, n=90, k=32):
        assert written.read_bytes() == (tmp_path / written.name).read_bytes()
    names = ["ndis90_k32_D_11.float32", "ndis90_k32_I_11.int32"]
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == names


def test_names_and_sizes_that_disagree_are_refused(tmp_path: Path):
    ids, similarity = nearest(90, 8)
    path = published(tmp_path, ids, similarity, 8, suffix=32)
    with pytest.raises(ArtifactError, match="named after 90 rows but holds 180 of k=4"):
        open_graph(path, k=4)
    with pytest.raises(ArtifactError, match="2,880 bytes, which is no whole number of rows of 7"):
        open_graph(path, k=7)
    with pytest.raises(ArtifactError, match="holds 8 neighbors a row; 9 of them are asked for"):
        open_graph(path, columns=9)
    other = path.with_name("other.int32")
    path.rename(other)
    with pytest.raises(ArtifactError, match="does not say how many neighbors a row has"):
        open_graph(other)
    with pytest.raises(ArtifactError, match="0 files beside it have the name of its similarities"):
        open_graph(other, k=8)
    values = tmp_path / "ndis90_k8_D_11.float32"
    assert open_graph(other, k=8, similarity=values).shape == (90, 8)
    similarity[:5].astype("<f4").tofile(values)
    with pytest.raises(ArtifactError, match="has 5 rows of 8"):
        open_graph(other, k=8, similarity=values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, s: ids.__setitem__((7, 3), 90), "row 7 holds an id outside of 0 to 89"),
        (lambda ids, s: ids.__setitem__((7, 3), -2), "row 7 holds an id outside of 0 to 89"),
        (lambda ids, s: s.__setitem__((9, 1), np.nan), "row 9 holds a similarity that is not fin"),
        (lambda ids, s: ids.__setitem__((4, 2), 4), "row 4 holds the image itself more than once"),
    ],
)
def test_damaged_lists_are_refused_with_the_row(tmp_path: Path, change, message):
    ids, similarity = nearest(90, 8)
    change(ids, similarity)
    graph = open_graph(published(tmp_path, ids, similarity, 8, suffix=32))
    with pytest.raises(ArtifactError, match=message):
        checked_rows(graph, 0, 90)


def test_an_entry_is_valid_by_its_id_whatever_its_similarity(tmp_path: Path):
    ids, similarity = nearest(90, 90)
    assert (similarity < 0).any()
    ids[3, -2:], similarity[3, -2:] = -1, np.nan
    found = checked_rows(open_graph(published(tmp_path, ids, similarity, 90, suffix=32)), 0, 90)
    np.testing.assert_array_equal(found[0], ids)


def test_the_image_leaves_its_list_by_value_and_can_be_put_back():
    ids = np.array([[9, 5, 7], [6, 9, 5], [1, 2, 3], [4, 0, 8]], np.int32)  # of images 5, 6, 7, 8
    column = self_column(ids, 5)
    assert column.tolist() == [1, 0, 2, 2]
    kept = without_column(ids, column)
    assert kept.tolist() == [[9, 7], [9, 5], [1, 2], [4, 0]]
    entries = ids[np.arange(4), column]
    np.testing.assert_array_equal(with_column(kept, column, entries), ids)


def test_classes_of_a_split_count_from_zero_here(tmp_path: Path):
    path = tmp_path / "label_idx.json"
    names = [f"n{i:08d}" for i in range(6)]
    given = {"label_names": names, "base_classes_1": [6, 2], "novel_classes_1": [1, 3]}
    path.write_text(json.dumps(given))
    split = read_class_split(path)
    assert {name: classes.tolist() for name, classes in split.items()} == {
        "base_classes_1": [1, 5],
        "novel_classes_1": [0, 2],
    }
    for wrong in ([0, 1], [1, 7], [2, 2]):
        path.write_text(json.dumps(given | {"novel_classes_1": wrong}))
        with pytest.raises(ArtifactError, match="distinct numbers from 1 to 6"):
            read_class_split(path)
    for text, message in (("[1]", "holds a list"), ("{}", "no list of class"), ("{", "as JSON")):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=message):
            read_class_split(path)


def test_the_digest_of_a_file_follows_its_content_and_size(tmp_path: Path):
    path = tmp_path / "a"
    rows_of(500).tofile(path)
    first = sampled_digest([path])
    assert sampled_digest([path]) == first
    changed = rows_of(500)
    changed[77, 2] += 1
    changed.tofile(path)
    assert sampled_digest([path]) != first
