"""The benchmark runner: graphopt against its peers. Its suites and recorded results are not installed."""
