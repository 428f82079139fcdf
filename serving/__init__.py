"""Online: a published index version in, answers out."""
