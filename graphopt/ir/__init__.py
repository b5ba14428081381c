"""What a graph is: the graph over torch.fx, provenance, the op registry and patterns."""
