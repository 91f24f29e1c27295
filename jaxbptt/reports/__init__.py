"""The report: what is computed, how it is worded, and the page."""
