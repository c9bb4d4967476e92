"""k-means by faiss, on CPUs or GPUs: another backend of `ops.kmeans`."""

from __future__ import annotations

from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.errors import ResourceError
from selfsup_ray.ops.kmeans import Clustering, first_ids, unit


def faiss_kmeans(
    points: Array,
    num_clusters: int,
    *,
    iterations: int = 25,
    seed: int = 0,
    threads: int = 1,
    gpus: int = 0,
    unit_norm: bool = False,
    initial: Array | None = None,
) -> Clustering:
    """Return K centroids of points (n, d) float32 by faiss.Kmeans on all points.

    gpus: GPUs that the points are divided among; 0: none, whatever there is. Starts where
    `ops.kmeans.kmeans` does, so that both reach about the same objective. Raises ResourceError when
    faiss is not installed or sees fewer GPUs, ConfigError when there are fewer points than
    clusters.
    """
    faiss = _faiss(gpus)
    rows = np.ascontiguousarray(points, np.float32)
    ids = first_ids(len(rows), num_clusters, seed=seed)
    start = np.array(rows[ids] if initial is None else initial, np.float32)
    means = faiss.Kmeans(
        rows.shape[1],
        num_clusters,
        niter=iterations,
        seed=seed,
        spherical=unit_norm,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    if gpus:  # not as an argument: faiss takes 1 for True, which stands for all there are
        means.gpu = gpus
        means.set_index()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        means.train(rows, init_centroids=unit(start) if unit_norm else start)
        centroids = np.array(means.centroids, np.float32)
        index = faiss.IndexFlatL2(rows.shape[1])
        index.add(centroids)
        distances, nearest = index.search(rows, 1)
    finally:
        faiss.omp_set_num_threads(before)
    # faiss notes the objective before each update; the one after the last comes from the search.
    later = [float(value) / len(rows) for value in means.obj[1:]]
    counts = np.bincount(nearest[:, 0], minlength=num_clusters)
    return Clustering(centroids, counts, (*later, float(distances.mean(dtype=np.float64))))


def _faiss(gpus: int) -> Any:
    try:
        import faiss
    except ImportError:
        raise ResourceError(
            "faiss is not installed here. Install faiss-gpu (Linux on x86-64) or faiss-cpu "
            "(elsewhere), or leave out backend=faiss."
        ) from None
    has = int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0
    if has < gpus:
        raise ResourceError(
            f"backend=faiss was asked to use {gpus} GPU{'s' if gpus > 1 else ''}, but faiss sees "
            f"{has} here. Set resources.gpus=0, or install faiss-gpu where there are GPUs."
        )
    return faiss
