"""Which photos show the same picture: fingerprints, their comparison, and the search as a join."""

import logging

# apache_beam warns on import that it cannot talk to BigQuery, which nothing here wants to.
logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
