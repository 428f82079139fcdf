"""What people send in names and cells, as checks see it and as messages show it."""

LETTERS = 80  # of it in a message


def shows(text: str) -> bool:
    """Whether a person would see anything of it."""
    return any(letter.isprintable() and not letter.isspace() for letter in text)


def shown(text: str) -> str:
    """In quotes, in one line, its end left out where it is long."""
    return repr(text if len(text) <= LETTERS else f"{text[:LETTERS]}…")
