"""Finds photos that show the same picture: fingerprints, their comparison, and a search on Beam."""

import logging

# apache_beam warns on import that it cannot use BigQuery, which nothing here needs.
logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
