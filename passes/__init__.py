"""One file a pass, and the ordered pipeline in ``default.py``."""
