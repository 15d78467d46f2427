"""The released checkpoints from Hugging Face."""
