"""The pass manager, verification, remarks and the cost model."""
