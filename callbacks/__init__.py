"""What happens beside the training loop: one file, one class, one entry of conf/callbacks each."""
