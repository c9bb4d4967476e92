"""selfsup_ray: representations, clusters, kNN graphs and labels for large image corpora."""
