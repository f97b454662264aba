"""The library: one file a method, ``methods/<family>/<slug>.py``, imported when asked for."""
