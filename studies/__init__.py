"""Studies: questions as YAML files, the reports of their runs, and the engine that runs them."""
