"""Which step of a plan runs when and where: task graphs, list scheduling on described machines, and lanes.

``tasks.py`` and ``lists.py`` are the policy, pure and on a virtual clock: what they say of a machine with a
hundred devices needs none. ``lanes.py`` and ``streams.py`` run a plan as they say, on threads of a CPU and on
streams of a GPU; ``arrange.py`` decides whether that is faster than one step after the other.
"""
