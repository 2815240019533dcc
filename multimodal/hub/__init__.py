"""What the name of a model means, and the Hugging Face Hub: download, model cards, push."""
