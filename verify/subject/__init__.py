"""The implementation under test: where it is, what it offers, what it launches."""
