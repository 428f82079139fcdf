"""One module a log format: turns published files into events and documents."""
