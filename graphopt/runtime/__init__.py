"""From a graph to a plan that runs: partitioner, executors, scheduler."""
