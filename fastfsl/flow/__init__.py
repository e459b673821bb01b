"""Flow Matching Alignment: coupling, path, velocity field, solver, inference plan."""
