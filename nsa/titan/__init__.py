"""The model in TorchTitan 0.2.2: its TrainSpec, layouts, data, checkpoints and metrics.

`nsa.titan.train_spec` registers the spec; a job names it with `job.custom_config_module = "nsa.titan.train_spec"`.
`nsa.titan3` shares flavors, initial weights, data, context parallelism and weights in Hugging Face's format.
"""
