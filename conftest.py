"""Every run of pytest here is one of the harness, and pytester runs the runs that show that a run can fail."""

pytest_plugins = ("pytester", "validation.plugin", "validation.perf.plugin")
