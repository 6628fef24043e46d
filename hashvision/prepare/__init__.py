"""Posts to a dataset folder, on Apache Beam: reading, tags, vocabulary, shards; never JAX."""

import hashvision.duplicates  # noqa: F401 (it silences Beam's warning on import)
