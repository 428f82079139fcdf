"""Online: a published index version in, answers out."""

__version__ = "0.1.0"
