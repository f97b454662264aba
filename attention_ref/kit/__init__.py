"""What others need to test their attention: checks, cases, golden vectors, the bug zoo."""

_PLACES = {
    "check": "conform", "Report": "conform", "cases": "vectors", "Case": "vectors",
    "onnx_attention": "onnx_node", "conventions": "frameworks",
}  # fmt: skip


def __getattr__(name):
    if name in _PLACES:  # imported on access: listing methods stays light
        import importlib

        found = getattr(importlib.import_module(f"attention_ref.kit.{_PLACES[name]}"), name)
        globals()[name] = found  # before a submodule of the same name hides it
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
