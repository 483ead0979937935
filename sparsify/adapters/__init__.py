"""Adapters on disk: what training changed, in our format and in PEFT's."""
