"""Tasks whose answers are known: each asks for something that stands far back in the window.

A task is a pure function of random numbers; `RecallDataModule` serves it. A new one is a function
in `symbols` or `needles`, and a line in `data.tasks.datamodule.TASKS`.
"""
