"""What a trained network is used for: texts, images, embeddings and likelihoods from prompts."""
