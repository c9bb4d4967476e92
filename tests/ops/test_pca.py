"""Principal components against scikit-learn and faiss, on whole and on cut-up rows."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.decomposition import PCA

from selfsup_ray.errors import ArtifactError
from selfsup_ray.ops.faiss_files import IndexRows, read_transform, write_flat_index, write_transform
from selfsup_ray.ops.pca import (
    LinearMap,
    block_moments,
    merged_moments,
    moments,
    principal_components,
    projection,
    random_rotation,
    unit_rows,
)


def made_rows(n: int = 500, d: int = 12, *, mean: float = 3.0) -> np.ndarray:
    generator = np.random.default_rng(0)
    scale = np.linspace(3, 0.5, d)
    turn = np.linalg.qr(generator.normal(size=(d, d)))[0]
    return ((generator.normal(size=(n, d)) * scale) @ turn + mean).astype(np.float32)


def test_moments_of_parts_merge_to_those_of_the_whole():
    rows = made_rows().astype(np.float64)
    whole = merged_moments(moments(rows[a:b]) for a, b in [(0, 1), (1, 77), (77, 500)])
    assert whole.count == 500
    np.testing.assert_allclose(whole.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(whole.scatter, 499 * np.cov(rows.T), rtol=1e-12)


def test_a_mean_far_from_zero_costs_no_digits():
    rows = made_rows().astype(np.float64)
    far = merged_moments(moments(part + 1e6) for part in np.array_split(rows, 9))
    np.testing.assert_allclose(far.scatter, moments(rows).scatter, rtol=1e-7, atol=1e-5)


def test_components_and_variances_are_scikit_learns_up_to_sign():
    rows = made_rows()
    theirs = PCA(n_components=5, svd_solver="full").fit(rows.astype(np.float64))
    ours = principal_components(block_moments(rows), dim=5)
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(ours.explained, theirs.explained_variance_ratio_, rtol=1e-10)
    signs = np.sign((ours.components * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(ours.components, signs[:, None] * theirs.components_, atol=1e-9)
    projected = projection(ours)(rows)
    np.testing.assert_allclose(projected, theirs.transform(rows) * signs, atol=2e-5)


def test_the_largest_entry_of_a_component_is_positive():
    components = principal_components(block_moments(made_rows()), dim=12).components
    assert (components[np.arange(12), np.abs(components).argmax(axis=1)] > 0).all()


def test_whitening_is_scikit_learns_and_half_of_it_lies_between():
    rows = made_rows()
    pca = principal_components(block_moments(rows), dim=6)
    theirs = PCA(n_components=6, whiten=True, svd_solver="full").fit_transform(rows)
    ours = projection(pca, whiten_power=0.5)(rows)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=2e-4)
    half = projection(pca, whiten_power=0.25)(rows).std(axis=0, ddof=1)
    np.testing.assert_allclose(half, pca.variance**0.25, rtol=1e-4)


def test_faiss_finds_the_same_subspace_and_variance():
    rows = made_rows()
    theirs = faiss.PCAMatrix(12, 4, 0, False)
    theirs.train(rows)
    ours = projection(principal_components(block_moments(rows), dim=4))(rows)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs.apply(rows)), atol=1e-3)


def test_rows_on_a_plane_have_two_components_of_any_variance():
    plane = np.random.default_rng(0).normal(size=(50, 2)) @ np.eye(2, 8)
    pca = principal_components(block_moments(plane.astype(np.float32)), dim=5)
    assert (pca.variance[2:] <= 1e-12).all() and pca.explained[:2].sum() == pytest.approx(1)
    np.testing.assert_allclose(pca.components @ pca.components.T, np.eye(5), atol=1e-12)
    equal = principal_components(block_moments(np.ones((9, 4), np.float32)), dim=2)
    assert equal.explained.tolist() == [0, 0]


def test_a_rotation_keeps_inner_products_and_is_uniform():
    turn = random_rotation(9, seed=3)
    np.testing.assert_allclose(turn @ turn.T, np.eye(9), atol=1e-12)
    np.testing.assert_array_equal(turn, random_rotation(9, seed=3))
    assert np.abs(turn - random_rotation(9, seed=4)).max() > 0.1
    # An entry of a uniform 3 x 3 rotation is uniform on [-1, 1] (Archimedes' hat box).
    corner = [random_rotation(3, seed=seed)[0, 0] for seed in range(400)]
    assert kstest(corner, "uniform", args=(-1, 2)).pvalue > 0.01


def test_rotated_components_have_the_same_inner_products():
    rows = made_rows()
    pca = principal_components(block_moments(rows), dim=6)
    plain, turned = projection(pca), projection(pca, rotation=random_rotation(6, seed=0))
    wanted = plain(rows) @ plain(rows).T
    np.testing.assert_allclose(turned(rows) @ turned(rows).T, wanted, atol=2e-3)


def test_rows_become_unit_rows_and_zeros_stay():
    rows = np.array([[3, 4], [0, 0], [-1e-20, 0]], np.float32)
    wanted = np.array([[0.6, 0.8], [0, 0], [-1, 0]], np.float32)
    np.testing.assert_allclose(unit_rows(rows), wanted, rtol=1e-6)


def test_faiss_applies_the_written_transform_as_we_do(tmp_path: Path):
    rows = made_rows()
    ours = projection(principal_components(block_moments(rows), dim=4))
    write_transform(tmp_path / "PCAR.vt", ours.matrix, ours.bias)
    theirs = faiss.read_VectorTransform(str(tmp_path / "PCAR.vt"))
    np.testing.assert_allclose(theirs.apply(rows), ours(rows), atol=2e-5)
    matrix, bias = read_transform(tmp_path / "PCAR.vt")
    np.testing.assert_array_equal(matrix, ours.matrix)
    np.testing.assert_array_equal(bias, ours.bias)


@pytest.mark.parametrize("rotate", [False, True])
def test_a_transform_that_faiss_trained_is_read_as_it_is_applied(tmp_path: Path, rotate: bool):
    rows = made_rows()
    theirs = faiss.PCAMatrix(12, 4, 0, rotate)
    theirs.train(rows)
    faiss.write_VectorTransform(theirs, str(tmp_path / "PCAR.vt"))
    matrix, bias = read_transform(tmp_path / "PCAR.vt")
    np.testing.assert_allclose(rows @ matrix.T + bias, theirs.apply(rows), atol=2e-5)


def test_other_and_damaged_transforms_are_refused(tmp_path: Path):
    path = tmp_path / "norm.vt"
    faiss.write_VectorTransform(faiss.NormalizationTransform(8), str(path))
    with pytest.raises(ArtifactError, match="no trained linear transform"):
        read_transform(path)
    path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(ArtifactError, match=r"norm.vt cannot be read by faiss"):
        read_transform(path)


@pytest.mark.parametrize("kind", ["Flat", "IVF4,Flat"])
def test_an_index_gives_its_vectors_back_by_id(tmp_path: Path, kind: str):
    rows = made_rows(300)
    index = faiss.index_factory(12, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    faiss.write_index(index, str(tmp_path / "ndis300.index"))
    opened = IndexRows(tmp_path / "ndis300.index")
    assert opened.shape == (300, 12)
    np.testing.assert_array_equal(opened.read(40, 300), rows[40:])


def test_a_written_index_finds_what_a_product_finds(tmp_path: Path):
    rows = unit_rows(made_rows(200, mean=0))
    write_flat_index(tmp_path / "a.index", rows)
    whole = faiss.IndexFlatIP(rows.shape[1])
    whole.add(rows)
    faiss.write_index(whole, str(tmp_path / "theirs.index"))
    assert (tmp_path / "a.index").read_bytes() == (tmp_path / "theirs.index").read_bytes()
    ids, scores = IndexRows(tmp_path / "a.index").search(rows[:9], 5)
    order = np.argsort(-(rows[:9] @ rows.T), axis=1)[:, :5]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)


def test_an_index_with_ids_of_its_own_says_so(tmp_path: Path):
    rows = np.eye(4, dtype=np.float32)
    index = faiss.IndexIDMap(faiss.IndexFlatIP(4))
    index.add_with_ids(rows, np.arange(5, 9))
    faiss.write_index(index, str(tmp_path / "ids.index"))
    with pytest.raises(ArtifactError, match=r"ids.index holds a IndexIDMap, which does not give"):
        IndexRows(tmp_path / "ids.index")
    index = faiss.index_factory(4, "IVF1,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add_with_ids(rows, np.arange(5, 9))
    faiss.write_index(index, str(tmp_path / "ivf.index"))
    with pytest.raises(ArtifactError, match=r"ivf.index: the vectors have other ids than 0 to 3"):
        IndexRows(tmp_path / "ivf.index")


def test_a_map_with_a_bias_is_the_map_without_a_mean():
    generator = np.random.default_rng(1)
    made = LinearMap(
        generator.normal(size=(3, 5)).astype(np.float32),
        generator.normal(size=5).astype(np.float32),
    )
    rows = generator.normal(size=(20, 5)).astype(np.float32)
    np.testing.assert_allclose(made(rows), rows @ made.matrix.T + made.bias, atol=1e-5)
