"""Everything that knows TorchTitan: the model and its TrainSpec, layouts, data, checkpoints and metrics.

`nsa.titan.train_spec` registers the spec; a job names it with `job.custom_config_module = "nsa.titan.train_spec"`.
"""
