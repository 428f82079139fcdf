"""Offline: highlight logs in, a published ScaNN index version out."""
