"""Posts to a dataset folder, on Apache Beam: reading, tags, vocabulary, shards; never JAX."""

import logging

# apache_beam warns on import that it cannot talk to BigQuery, which nothing here wants to.
logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
