"""What the author of a kernel measures: registers, tiles, launches, memory."""
