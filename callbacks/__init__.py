"""What happens beside the training loop: one file, one class, one entry of conf/callbacks each.

The two loggers live here too, `csv_logger` and `wandb_logger`; conf/logger has their entries.
"""
