"""What an exported model carries along so that transformers can load it."""
