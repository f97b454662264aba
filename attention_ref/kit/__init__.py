"""What others need to test their attention: checks, golden vectors, comparisons, the bug zoo."""


def __getattr__(name):
    if name in ("check", "Report"):  # imported on access: listing methods stays light
        from attention_ref.kit import conform

        return getattr(conform, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
