"""Who scores answers: models behind an endpoint, by a rubric, and local classifiers of traits."""
