"""``python -m verify report --format html``: the records as static pages that open from disk."""
