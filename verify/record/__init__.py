"""What records hold and what they say: schema, archive, staleness, verdict."""
