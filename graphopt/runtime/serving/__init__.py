"""Sessions: requests from many threads, served in batches.

``policy.py`` decides which requests form the next batch and when to wait: pure, driven by a clock that is
handed in. ``session.py`` runs it on threads and the wall's clock, ``simulate.py`` on a virtual one.
"""
