"""What people ask for and with what: tasks, prompts, pictures and clips, as the model takes them."""
