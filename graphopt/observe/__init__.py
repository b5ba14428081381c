"""What graphopt tells its user: the report and its pages."""
