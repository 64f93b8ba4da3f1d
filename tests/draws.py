"""How many examples hypothesis draws for a test whose examples are dear."""

from hypothesis import settings


def examples(count: int) -> settings:
    """`count` examples, or as many as the profile says where those are fewer: one in "one", which CI takes for the newer Python."""
    return settings(max_examples=min(count, settings().max_examples))
