"""The published modules that vLLM integrations use; there is no plugin here."""
