"""Makes a dataset folder from posts, on Apache Beam and without JAX."""

import hashvision.duplicates  # noqa: F401 (its import silences a warning of Beam)
