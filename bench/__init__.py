"""The benchmark runner: suites, peers, and the results that were recorded with them."""
